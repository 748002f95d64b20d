"""Health follows the engine, and never waits behind a generation."""

import asyncio
from contextlib import AsyncExitStack

import grpc
import grpc.aio
import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.engines.base import EngineFailedError
from flywheel_server.engines.scripted import Script, ScriptedEngine
from flywheel_server.server import serve
from flywheel_server.settings import Settings
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.server.test_errors import details_of
from tests.serving import connected, serving

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE = "flywheel.v1.GenerationService"


class SlowEngine(ScriptedEngine):
    """Takes as long to show that it works as the test wants."""

    def __init__(self) -> None:
        super().__init__()
        self.listening = asyncio.Event()
        self.works = asyncio.Event()

    async def check(self) -> None:
        self.listening.set()
        await self.works.wait()


async def test_it_serves_only_when_the_engine_has_produced_a_token(unused_tcp_port: int) -> None:
    engine = SlowEngine()
    address = f"127.0.0.1:{unused_tcp_port}"
    leave = asyncio.Event()

    async def run() -> None:
        async with serve(engine, Settings(address=address, drain_timeout=0)):
            await leave.wait()

    running = asyncio.create_task(run())
    await engine.listening.wait()
    async with connected(address) as target:
        health = health_pb2_grpc.HealthStub(target.channel)
        for name in ("", SERVICE):
            assert (await health.Check(health_pb2.HealthCheckRequest(service=name))).status == NOT_SERVING
        for call in (
            target.stub.GenerateAll(pb.GenerationRequest(text="x", max_tokens=1)),
            target.stub.GetModel(pb.GetModelRequest()),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert {ErrorInfo, RetryInfo} == details_of(caught.value).keys()
        watch = health.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        assert (await watch.read()).status == NOT_SERVING
        engine.works.set()
        assert (await watch.read()).status == SERVING
        leave.set()
        assert (await watch.read()).status == NOT_SERVING
        watch.cancel()
    await running


async def test_health_of_a_name_that_is_not_there() -> None:
    async with serving(ScriptedEngine()) as target:
        health = health_pb2_grpc.HealthStub(target.channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health.Check(health_pb2.HealthCheckRequest(service="nobody"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_health_answers_while_the_engine_is_full() -> None:
    async with serving(ScriptedEngine(Script(slots=1, token_delay=0.05))) as target:
        calls = [target.stub.GenerateAll(pb.GenerationRequest(text="x", max_tokens=5000)) for _ in range(20)]
        health = health_pb2_grpc.HealthStub(target.channel)
        for _ in range(10):
            assert (await health.Check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=5)).status == SERVING
        for call in calls:
            call.cancel()


async def test_an_engine_that_does_not_work_ends_the_start() -> None:
    engine = ScriptedEngine(Script(fail_after=0))
    with pytest.raises(EngineFailedError):
        async with serving(engine):
            pass


async def test_running_calls_finish_within_the_drain_timeout() -> None:
    engine = ScriptedEngine(Script(token_delay=0.01))
    settings = Settings(address="127.0.0.1:0", drain_timeout=20)
    async with AsyncExitStack() as client:
        async with serve(engine, settings) as port:
            target = await client.enter_async_context(connected(f"127.0.0.1:{port}"))
            call = target.stub.GenerateDeltas(pb.GenerationRequest(text="x", max_tokens=60))
            await call.read()
            reading = asyncio.ensure_future(_last(call))
        assert (await reading).finish_reason == "length"


async def _last(call: grpc.aio.UnaryStreamCall[pb.GenerationRequest, pb.GenerationDelta]) -> pb.GenerationDelta:
    last = pb.GenerationDelta()
    # Read as it was begun: iterating over a call that was read is an error.
    while isinstance(delta := await call.read(), pb.GenerationDelta):
        last = delta
    return last
