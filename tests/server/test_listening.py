"""Where the server listens, who may connect, and how much one client may use."""

import asyncio
import socket
from contextlib import AsyncExitStack
from typing import Any

import grpc
import grpc.aio
import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_proto.v1 import generation_pb2_grpc
from flywheel_server.engines.scripted import Script, ScriptedEngine
from flywheel_server.server import serve
from flywheel_server.settings import Settings
from structlog.testing import capture_logs

from tests.server.http2_client import http2, prefixed
from tests.server.test_command import command, ready_line
from tests.serving import drained, serving, until

KEY = "0123456789abcdef"
ONE = pb.GenerationRequest(text="x", max_tokens=1)


async def listening(**settings: Any) -> None:
    async with serve(ScriptedEngine(), Settings(withdraw_window=0, **settings)):
        pass


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "example.com:0", "10.1.2.3:0", "128.0.0.1:0"])
async def test_it_does_not_let_a_network_call_without_authentication(address: str) -> None:
    with pytest.raises(ValueError, match="anybody") as refused:
        await listening(address=address)
    assert "--allow-unauthenticated-network-callers" in str(refused.value)
    assert address in str(refused.value)


async def test_the_command_says_so_in_one_line() -> None:
    async with command("--engine", "scripted", "--address", "0.0.0.0:0") as process:
        _, err = await asyncio.wait_for(process.communicate(), 20)
        assert process.returncode == 1
        (line,) = err.decode().strip().splitlines()
        assert line.startswith("flywheel-server: anybody who reaches 0.0.0.0:0 could call.")


@pytest.mark.parametrize("address", ["127.0.0.1:0", "127.9.8.7:0", "localhost:0", "[::1]:0"])
async def test_the_loopback_interface_is_open(address: str) -> None:
    if address.startswith("[") and not socket.has_ipv6:
        pytest.skip("there is no IPv6 here")
    with capture_logs() as logs:
        try:
            await listening(address=address)
        except OSError:
            assert address.startswith("["), "only IPv6 may be missing on a machine"
    assert "no TLS" not in str(logs)


@pytest.mark.parametrize("settings", [{"api_keys": KEY}, {"allow_unauthenticated_network_callers": True}])
async def test_what_opens_it_to_a_network_and_the_warning_without_tls(settings: dict[str, Any]) -> None:
    with capture_logs() as logs:
        # Any name but localhost may lead anywhere, so only the system knows that this is the loopback interface.
        await listening(address="LOCALHOST:0", **settings)
    assert "in the clear" in str(logs)


@pytest.mark.parametrize(("version", "warned"), [("1.73.1", True), ("1.83.9", True), ("1.84.0", False), ("2.0.0rc1", False)])
async def test_a_grpc_version_that_buffers_requests_of_any_length_is_warned_of(
    version: str, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grpc.__version__", version)
    with capture_logs() as logs:
        await listening(address="LOCALHOST:0", api_keys=KEY)
    assert ("install 1.84 or newer" in str(logs)) == warned


@pytest.mark.parametrize(
    "given", [{"tls_cert": "a"}, {"tls_key": "a"}, {"tls_client_ca": "a"}, {"tls_cert": "", "tls_client_ca": "a"}]
)
async def test_half_of_tls_is_refused(given: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="--tls-cert and --tls-key"):
        await listening(address="127.0.0.1:0", **given)


@pytest.mark.parametrize("setting", ["api_keys_file", "tls_cert"])
async def test_a_file_that_is_not_there_is_named(setting: str) -> None:
    with pytest.raises(OSError, match=setting.upper()):
        await listening(
            address="127.0.0.1:0", **{"tls_key": "/nowhere" if setting == "tls_cert" else None, setting: "/nowhere"}
        )


async def test_the_example_that_the_command_prints_fits_its_settings() -> None:
    async with command("--engine", "scripted", "--address", "127.0.0.1:0", environment={"FLYWHEEL_API_KEYS": KEY}) as process:
        line, _ = await ready_line(process)
        assert line.startswith("ready: grpcurl -plaintext -H 'authorization: Bearer KEY' -d '")


async def test_reflection_can_be_switched_off() -> None:
    async with serving(ScriptedEngine(), reflection=False) as target:
        for version in ("v1", "v1alpha"):
            path = f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo"
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await target.channel.unary_unary(path, bytes, bytes)(b"")
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        await target.stub.GenerateAll(ONE)


async def test_more_metadata_than_the_limit_is_refused_and_less_is_not() -> None:
    async with serving(ScriptedEngine(), max_header_bytes=4096) as target:
        await target.stub.GenerateAll(ONE, metadata=(("x", "y" * 3000),))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await target.stub.GenerateAll(ONE, metadata=(("x", "y" * 5000),))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await target.stub.GenerateAll(ONE)


@pytest.mark.parametrize("path", ["/flywheel.v1.GenerationService/GetModel", "/grpc.health.v1.Health/Watch"])
async def test_the_limit_holds_before_a_client_has_acknowledged_the_settings_of_the_server(path: str) -> None:
    async with serving(ScriptedEngine(), max_header_bytes=4096) as target, http2(target.address) as client:
        # The headers are sent before anything is read.
        streams = [client.begin(path, *(("x", "y" * 500) for _ in range(entries))) for entries in (8, 400)]
        for stream in streams:
            await client.send(stream, prefixed(b""), end=True)
            assert await stream.status() == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
        stream = client.begin(path, *(("x", "y" * 500) for _ in range(7)))
        await client.send(stream, prefixed(b""), end=True)
        await until(lambda: len(stream.data) > 0, "it is answered")


async def test_a_connection_has_so_many_calls_at_a_time_and_further_ones_wait() -> None:
    engine = ScriptedEngine(Script(hang_after=1))
    async with serving(engine, max_streams=3) as target:
        # After this call, the client knows the limit, and holds back further calls.
        await target.stub.GenerateAll(ONE)
        calls = [target.stub.GenerateAll(pb.GenerationRequest(text="x", max_tokens=9)) for _ in range(5)]
        await until(lambda: engine.running == 3, "as many run as the limit allows")
        # Another connection has calls of its own.
        own = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(target.address, options=own) as channel:
            other: Any = generation_pb2_grpc.GenerationServiceStub(channel)
            await other.GenerateAll(ONE, timeout=20)
        assert engine.running == 3
        assert not any(call.done() for call in calls)
        for call in calls:
            call.cancel()


async def test_only_so_many_connections_at_a_time() -> None:
    async with serving(ScriptedEngine(), max_connections=3) as target:
        await target.stub.GenerateAll(ONE)
        host, port = target.address.split(":")

        async def connect(stack: AsyncExitStack) -> asyncio.StreamReader:
            reader, writer = await asyncio.open_connection(host, int(port))
            # Keeps the writer, because it closes the connection when it is collected.
            stack.push(lambda *_: writer.transport.abort())
            # The preface of HTTP/2 and empty settings.
            writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
            return reader

        async with AsyncExitStack() as stack:
            answers = [await connect(stack) for _ in range(4)]
            greetings = [await asyncio.wait_for(reader.read(9), 10) for reader in answers]
            assert b"" in greetings, "one is closed at once"
            assert greetings.count(b"") < len(greetings), "others are not"
            await target.stub.GenerateAll(ONE)

        async def another() -> bool:
            async with AsyncExitStack() as stack:
                return await (await connect(stack)).read(9) != b""

        await until(another, "there is room again")


async def test_a_connection_is_renewed_with_age_and_its_calls_finish() -> None:
    engine = ScriptedEngine(Script(token_delay=0.01))
    async with serving(engine, max_connection_age=0.3, max_connection_age_grace=30) as target:
        long = asyncio.ensure_future(drained(target.stub.GenerateDeltas(pb.GenerationRequest(text="x", max_tokens=150))))
        for _ in range(2):
            await target.stub.GenerateAll(ONE)
            assert target.channel.get_state() is grpc.ChannelConnectivity.READY
            # The server asks for another connection, and the next call makes one.
            await asyncio.wait_for(target.channel.wait_for_state_change(grpc.ChannelConnectivity.READY), 10)
        assert not long.done()
        await long


async def test_a_call_that_outlasts_the_grace_ends_with_a_status() -> None:
    engine = ScriptedEngine(Script(hang_after=5))
    async with serving(engine, max_connection_age=0.1, max_connection_age_grace=0.1) as target:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await drained(target.stub.GenerateDeltas(pb.GenerationRequest(text="x", max_tokens=150)))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        await until(lambda: engine.running == 0, "its work ends")
