"""channelz: what it shows, and to whom."""

from typing import Any

import grpc
import grpc.aio
import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.engines.scripted import ScriptedEngine
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc

from tests.serving import as_dict, serving

KEY = "a-key-that-is-long-enough"


def stub_of(target: Any) -> Any:
    return channelz_pb2_grpc.ChannelzStub(target.channel)


async def test_channelz_shows_the_server_and_its_connections() -> None:
    async with serving(ScriptedEngine(), channelz=True) as target:
        stub = stub_of(target)
        await target.stub.GetStats(pb.GetStatsRequest())
        call = stub.GetServers(channelz_pb2.GetServersRequest())
        server = next(each for each in (await call).server if each.data.calls_started)
        assert "x-request-id" in as_dict(await call.initial_metadata())
        sockets = await stub.GetServerSockets(channelz_pb2.GetServerSocketsRequest(server_id=server.ref.server_id))
        assert sockets.socket_ref
        socket = await stub.GetSocket(channelz_pb2.GetSocketRequest(socket_id=sockets.socket_ref[0].socket_id))
        assert socket.socket.data.streams_started >= 3
        assert await stub.GetTopChannels(channelz_pb2.GetTopChannelsRequest()) is not None


async def test_something_that_does_not_exist_is_not_found() -> None:
    async with serving(ScriptedEngine(), channelz=True) as target:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub_of(target).GetServer(channelz_pb2.GetServerRequest(server_id=2**40))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_channelz_needs_a_key_if_calls_do() -> None:
    async with serving(ScriptedEngine(), channelz=True, api_keys=KEY) as target:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub_of(target).GetServers(channelz_pb2.GetServersRequest())
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        metadata = (("authorization", f"Bearer {KEY}"),)
        assert (await stub_of(target).GetServers(channelz_pb2.GetServersRequest(), metadata=metadata)).server


async def test_channelz_is_off_by_default() -> None:
    async with serving(ScriptedEngine()) as target:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub_of(target).GetServers(channelz_pb2.GetServersRequest())
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
