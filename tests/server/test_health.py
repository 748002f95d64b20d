"""Health follows the engine, and never waits behind a generation."""

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import grpc
import grpc.aio
import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.engines.base import EngineFailedError, EngineSetupError, EngineStats, EngineUnavailableError
from flywheel_server.engines.scripted import Script, ScriptedEngine
from flywheel_server.health import RUNNERS
from flywheel_server.server import serve
from flywheel_server.settings import Settings
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.server.test_errors import details_of
from tests.serving import Target, connected, drained, last_of, serving, until

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE = "flywheel.v1.GenerationService"


class SlowEngine(ScriptedEngine):
    """Passes its check when the test says so."""

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
        async with serve(engine, Settings(address=address, withdraw_window=0, drain_timeout=0)):
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


@pytest.mark.skipif(not hasattr(health_pb2, "HealthListRequest"), reason="this grpcio-health-checking has no List")
async def test_health_lists_every_name() -> None:
    async with serving(ScriptedEngine()) as target:
        listed = await health_pb2_grpc.HealthStub(target.channel).List(health_pb2.HealthListRequest())
        assert {name: response.status for name, response in listed.statuses.items()} == {
            "": SERVING,
            SERVICE: SERVING,
            RUNNERS: SERVING,
        }


async def test_watching_a_name_that_is_not_there_waits_for_it() -> None:
    async with serving(ScriptedEngine()) as target:
        watch = health_pb2_grpc.HealthStub(target.channel).Watch(health_pb2.HealthCheckRequest(service="nobody"))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        watch.cancel()


async def test_health_answers_while_the_engine_is_full() -> None:
    engine = ScriptedEngine(Script(slots=1, token_delay=0.05))
    async with serving(engine) as target:
        calls = [target.stub.GenerateAll(pb.GenerationRequest(text="x", max_tokens=5000)) for _ in range(20)]

        async def others_wait() -> bool:
            stats = await target.stub.GetStats(pb.GetStatsRequest())
            return engine.running == 1 and bool(stats.active + stats.queued == len(calls))

        await until(others_wait, "one call runs, and the others wait")
        health = health_pb2_grpc.HealthStub(target.channel)
        for _ in range(10):
            assert (await health.Check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=5)).status == SERVING
        for call in calls:
            call.cancel()


async def test_an_engine_that_does_not_work_ends_the_start() -> None:
    class BrokenEngine(ScriptedEngine):
        async def check(self) -> None:
            raise EngineFailedError("it makes no token")

    with pytest.raises(EngineFailedError):
        async with serving(BrokenEngine()):
            pass


async def test_calls_are_taken_in_the_withdraw_window_although_health_says_otherwise_and_refused_after_it() -> None:
    engine = ScriptedEngine(Script(token_delay=0.01))
    settings = Settings(address="127.0.0.1:0", withdraw_window=1.5, drain_timeout=20)
    outcomes: list[grpc.StatusCode] = []
    async with AsyncExitStack() as client:
        async with serve(engine, settings) as port:
            target = await client.enter_async_context(connected(f"127.0.0.1:{port}"))
            watch = health_pb2_grpc.HealthStub(target.channel).Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == SERVING
            # This call keeps the server draining while the test watches.
            long = asyncio.ensure_future(drained(target.stub.GenerateAll(pb.GenerationRequest(text="x", max_tokens=300))))
            await until(lambda: engine.running == 1, "it runs")

            async def look() -> None:
                assert (await watch.read()).status == NOT_SERVING
                while grpc.StatusCode.UNAVAILABLE not in outcomes:
                    call = target.stub.GenerateAll(pb.GenerationRequest(text="x", max_tokens=1))
                    outcomes.append(await call.code())

            looking = asyncio.ensure_future(look())
        await looking
        await long
    assert outcomes[0] is grpc.StatusCode.OK
    # grpc itself ends calls that arrive at the moment of the stop with CANCELLED (grpc#41785).
    assert set(outcomes) - {grpc.StatusCode.CANCELLED} == {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}


async def test_running_calls_finish_within_the_drain_timeout() -> None:
    engine = ScriptedEngine(Script(token_delay=0.01))
    settings = Settings(address="127.0.0.1:0", withdraw_window=0, drain_timeout=20)
    async with AsyncExitStack() as client:
        async with serve(engine, settings) as port:
            target = await client.enter_async_context(connected(f"127.0.0.1:{port}"))
            call = target.stub.GenerateDeltas(pb.GenerationRequest(text="x", max_tokens=60))
            await call.read()
            reading = asyncio.ensure_future(last_of(call))
        assert (await reading).finish_reason == "length"


REQUEST = pb.GenerationRequest(text="x", max_tokens=50)


async def test_a_call_that_outlasts_the_drain_timeout_ends_with_a_status_that_says_why() -> None:
    engine = ScriptedEngine(Script(hang_after=2))
    async with AsyncExitStack() as client:
        async with serve(engine, Settings(address="127.0.0.1:0", withdraw_window=1, drain_timeout=1)) as port:
            target = await client.enter_async_context(connected(f"127.0.0.1:{port}"))
            watch = health_pb2_grpc.HealthStub(target.channel).Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == SERVING
            calls = [target.stub.GenerateDeltas(REQUEST), target.stub.Generate(REQUEST), target.stub.GenerateAll(REQUEST)]
            endings = [asyncio.ensure_future(drained(call)) for call in calls]
            await until(lambda: engine.running == 3, "the calls run")
            late = asyncio.ensure_future(_call_while_draining(watch, target))
        for ending in (*endings, late):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await ending
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert details_of(caught.value)[ErrorInfo].reason == "ENGINE_UNAVAILABLE"
            assert RetryInfo in details_of(caught.value)
    assert engine.running == 0


async def _call_while_draining(watch: Any, target: Target) -> None:
    assert (await watch.read()).status == NOT_SERVING
    await target.stub.GenerateAll(REQUEST)


async def test_a_stream_that_never_ends_does_not_keep_the_server_from_stopping() -> None:
    settings = Settings(address="127.0.0.1:0", withdraw_window=0, drain_timeout=60)
    async with AsyncExitStack() as client, asyncio.timeout(20), serve(ScriptedEngine(), settings) as port:
        target = await client.enter_async_context(connected(f"127.0.0.1:{port}"))
        watch = health_pb2_grpc.HealthStub(target.channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING


class RemoteEngine(ScriptedEngine):
    """Can be out of reach, and without runners."""

    def __init__(self) -> None:
        super().__init__()
        self.runners = 1
        self.error: Exception | None = None

    async def stats(self) -> EngineStats:
        if self.error:
            raise self.error
        return EngineStats(backlog=0, num_total_runners=self.runners)


async def test_health_follows_the_engine_and_its_runners() -> None:
    engine = RemoteEngine()
    engine.runners = 0
    async with serving(engine, health_interval=0.01) as target:
        health = health_pb2_grpc.HealthStub(target.channel)

        async def statuses() -> list[int]:
            names = ("", SERVICE, RUNNERS)
            return [(await health.Check(health_pb2.HealthCheckRequest(service=name))).status for name in names]

        async def become(*expected: int) -> None:
            async def reported() -> bool:
                return await statuses() == list(expected)

            await until(reported, f"health is {expected}")

        assert await statuses() == [SERVING, SERVING, NOT_SERVING]
        engine.runners = 2
        await become(SERVING, SERVING, SERVING)
        for error in (EngineUnavailableError("gone"), EngineSetupError("no class", {}), RuntimeError("a bug")):
            engine.error = error
            await become(NOT_SERVING, NOT_SERVING, NOT_SERVING)
            # Calls are accepted whatever health says.
            await drained(target.stub.GenerateAll(pb.GenerationRequest(text="x", max_tokens=1)))
            engine.error = None
            await become(SERVING, SERVING, SERVING)


async def test_an_engine_that_does_not_say_how_it_is_is_out_of_reach() -> None:
    class HangingEngine(RemoteEngine):
        async def stats(self) -> EngineStats:
            await asyncio.Event().wait()
            raise AssertionError

    async with serving(HangingEngine(), health_interval=0.01) as target:
        health = health_pb2_grpc.HealthStub(target.channel)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == NOT_SERVING
