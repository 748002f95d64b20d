"""A server that stops: its port closes, its callers are told to leave, and accepted calls finish."""

import asyncio
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import Any

import grpc
import grpc.aio
import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.engines.scripted import ScriptedEngine
from flywheel_server.errors import DETAILS_KEY
from flywheel_server.server import serve
from flywheel_server.settings import Settings
from google.rpc import status_pb2
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from tests.draining import Draining
from tests.server.test_command import SCRIPTED, command, ready_line
from tests.server.test_errors import details_of
from tests.server.test_reading import METHODS, PATH
from tests.server.test_reflection import VERSIONS
from tests.server.test_supervision import MortalEngine, dying
from tests.serving import Target, as_dict, connected, drained, last_of, until

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SHORT = pb.GenerationRequest(text="x", max_tokens=1)
LONG = pb.GenerationRequest(text="x", max_tokens=8000)


@asynccontextmanager
async def held(port: int, **settings: Any) -> AsyncIterator[tuple[Draining, Target, asyncio.Future[Any]]]:
    """Gives a server, a channel to it, and a call that the server works on until `engine.may_go_on`."""
    server = Draining(f"127.0.0.1:{port}", **settings)
    try:
        async with connected(server.address) as target:
            call = target.stub.GenerateDeltas(pb.GenerationRequest(text="x", max_tokens=3), wait_for_ready=True)
            await call.read()
            yield server, target, asyncio.ensure_future(last_of(call))
    finally:
        server.engine.may_go_on.set()
        server.stop()
        async with asyncio.timeout(30):
            await server.stopped()


async def says_that_it_stops(call: Any) -> None:
    """Fails unless the call ends with the status of a server that stops."""
    with suppress(grpc.aio.AioRpcError):
        async with asyncio.timeout(20):
            while await call.read() is not grpc.aio.EOF:
                pass
    assert await call.code() is grpc.StatusCode.UNAVAILABLE
    status = status_pb2.Status.FromString(as_dict(await call.trailing_metadata())[DETAILS_KEY])
    reasons = [error_info(detail).reason for detail in status.details if detail.Is(ErrorInfo.DESCRIPTOR)]
    assert reasons == ["ENGINE_UNAVAILABLE"]
    assert any(detail.Is(RetryInfo.DESCRIPTOR) for detail in status.details)


def error_info(detail: Any) -> ErrorInfo:
    info = ErrorInfo()
    detail.Unpack(info)
    return info


async def watching(target: Target) -> Any:
    call = health_pb2_grpc.HealthStub(target.channel).Watch(health_pb2.HealthCheckRequest())
    assert (await call.read()).status == SERVING
    return call


async def reflecting(target: Target, version: str) -> Any:
    call = target.channel.stream_stream(
        f"/{version}.ServerReflection/ServerReflectionInfo",
        reflection_pb2.ServerReflectionRequest.SerializeToString,
        reflection_pb2.ServerReflectionResponse.FromString,
    )()
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    assert isinstance(await call.read(), reflection_pb2.ServerReflectionResponse)
    return call


async def sending(target: Target, method: str) -> Any:
    """Makes a call whose request does not arrive, and returns the call when the server waits for the request."""
    call = target.channel.stream_stream(PATH + method, bytes, bytes)()
    await call.wait_for_connection()
    # Calls are accepted one after the other.
    await target.stub.GetStats(pb.GetStatsRequest())
    return call


LASTING: dict[str, Callable[[Target], Any]] = {
    "Watch": watching,
    **{version: partial(reflecting, version=version) for version in VERSIONS},
    **{f"request of {method}": partial(sending, method=method) for method in METHODS},
}
"""Calls that a caller can keep open for as long as it likes."""


@pytest.mark.parametrize("lasting", LASTING.values(), ids=LASTING)
async def test_lasting_calls_are_told_that_the_server_stops_while_a_generation_still_runs(
    lasting: Callable[[Target], Any], unused_tcp_port: int
) -> None:
    async with held(unused_tcp_port) as (server, target, running):
        call = await lasting(target)
        server.stop()
        if lasting is watching:
            assert (await call.read()).status == NOT_SERVING
        await says_that_it_stops(call)
        assert server.engine.running == 1
        server.engine.may_go_on.set()
        assert (await running).finish_reason == "length"


async def test_the_port_is_closed_and_clients_leave_while_accepted_calls_finish(unused_tcp_port: int) -> None:
    async with held(unused_tcp_port, max_concurrent=1) as (server, target, running):
        waiting = [asyncio.ensure_future(drained(getattr(target.stub, method)(SHORT))) for method in METHODS[:3]]

        async def are_queued() -> bool:
            return bool((await target.stub.GetStats(pb.GetStatsRequest())).queued == len(waiting))

        await until(are_queued, "they wait for their turn")
        async with connected(server.address) as idle:
            await idle.channel.channel_ready()
            server.stop()
            await until(lambda: not server.is_open(), "the port is closed")
            await until(lambda: idle.channel.get_state() is grpc.ChannelConnectivity.IDLE, "an idle connection ends")
            for channel in (idle, target):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await channel.stub.GenerateAll(SHORT)
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert server.engine.running == 1
        assert not any(future.done() for future in [running, *waiting])
        server.engine.may_go_on.set()
        assert (await running).finish_reason == "length"
        await asyncio.gather(*waiting)


async def test_the_port_is_open_for_the_withdraw_window_and_closed_at_a_second_signal(unused_tcp_port: int) -> None:
    async with held(unused_tcp_port, withdraw_window=60) as (server, target, running):
        watch = await watching(target)
        server.stop()
        assert (await watch.read()).status == NOT_SERVING
        async with connected(server.address) as late:
            await late.stub.GenerateAll(SHORT)
        server._running.cancel()
        await says_that_it_stops(watch)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await running
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert details_of(caught.value)[ErrorInfo].reason == "ENGINE_UNAVAILABLE"
        assert not server.is_open()
        with pytest.raises(asyncio.CancelledError):
            await server.stopped()
        server._running = asyncio.create_task(asyncio.sleep(0))


async def test_no_lasting_call_delays_the_stop_of_a_server_without_generations() -> None:
    settings = Settings(address="127.0.0.1:0", withdraw_window=0, drain_timeout=60)
    async with AsyncExitStack() as clients:
        async with serve(ScriptedEngine(), settings) as port:
            address = f"127.0.0.1:{port}"
            idle, target = [await clients.enter_async_context(connected(address)) for _ in range(2)]
            await idle.channel.channel_ready()
            calls = [await lasting(target) for lasting in LASTING.values()]
            for said in (b"", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])):
                # One sends nothing. The other begins HTTP/2, and then answers nothing, not even GOAWAY and its ping.
                silent = clients.enter_context(socket.create_connection(("127.0.0.1", port)))
                silent.sendall(said)
            began = time.monotonic()
        assert time.monotonic() - began < 5
        for call in calls:
            await says_that_it_stops(call)


async def test_a_server_whose_engine_is_dead_does_not_stay_to_refuse_calls() -> None:
    engine = MortalEngine()
    async with asyncio.timeout(20), dying(engine, engine_death="exit", withdraw_window=60) as target:
        engine.dead.set()
        with pytest.raises(grpc.aio.AioRpcError):
            await target.stub.GenerateAll(SHORT)


async def test_the_command_with_watches_open_ends_soon_after_the_withdraw_window() -> None:
    async with command(*SCRIPTED, "--withdraw-window", "0.5", "--drain-timeout", "60") as process:
        _, address = await ready_line(process)
        async with connected(address) as target:
            watches = [await watching(target) for _ in range(3)]
            began = time.monotonic()
            process.send_signal(signal.SIGTERM)
            for watch in watches:
                assert (await watch.read()).status == NOT_SERVING
                await says_that_it_stops(watch)
            assert time.monotonic() - began > 0.5
            await asyncio.wait_for(process.wait(), 10)
    assert process.returncode == 0
