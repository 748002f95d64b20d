"""An engine that dies is noticed and restarted, or the server ends: it never goes on with a dead engine."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server import supervision
from flywheel_server.engines.base import EngineFailedError, EngineOverloadedError, EngineUnavailableError
from flywheel_server.engines.scripted import Script
from flywheel_server.supervision import EngineDiedError
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.pulled import PulledEngine
from tests.server.test_command import SCRIPTED, command, ready_line
from tests.server.test_errors import METHODS, details_of
from tests.serving import Target, code_of, connected, drained, serving, until
from tests.telemetry.logged import logging_to

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
ONE = pb.GenerationRequest(text="x", max_tokens=1)
LONG = pb.GenerationRequest(text="x", max_tokens=1000)


class MortalEngine(PulledEngine):
    """Works until the test kills it, and again after a restart. May refuse to start or to stop."""

    def __init__(self, script: Script | None = None) -> None:
        super().__init__(script)
        self.starts = 0
        self.dead = asyncio.Event()
        self.may_start = asyncio.Event()
        self.may_start.set()
        self.stops = True
        self.start_error: Exception | None = None

    async def __aenter__(self) -> Any:
        await self.may_start.wait()
        if self.start_error:
            raise self.start_error
        self.starts += 1
        self.dead.clear()
        return self

    async def __aexit__(self, *exception: object) -> None:
        if not self.stops:
            await asyncio.Event().wait()

    async def events(self, prepared: Any) -> Any:
        async for event in super().events(prepared):
            if self.dead.is_set():
                raise EngineFailedError("dead")
            yield event

    async def check(self) -> None:
        if self.dead.is_set():
            raise EngineFailedError("dead")


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "RESTART_INTERVAL", 0.01)
    monkeypatch.setattr(supervision, "MIN_RESTART_PAUSE", 0.01)


@pytest.mark.parametrize("method", METHODS)
async def test_a_dead_engine_is_started_again_and_everybody_is_told(method: str) -> None:
    engine = MortalEngine(Script(token_delay=0.005, hang_after=50))
    async with serving(engine) as target:
        health = health_pb2_grpc.HealthStub(target.channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(service="flywheel.v1.GenerationService"))
        assert (await watch.read()).status == SERVING
        hanging = asyncio.ensure_future(code_of(getattr(target.stub, method)(LONG)))
        await until(lambda: engine.running == 1, "it runs")
        engine.may_start.clear()
        engine.dead.set()
        # A call may find the engine dead. Others then end with a status that says to try again.
        codes = {await code_of(getattr(target.stub, method)(ONE)), await hanging}
        assert codes <= {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE}
        assert (await watch.read()).status == NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await drained(getattr(target.stub, method)(ONE))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert details_of(caught.value).keys() == {ErrorInfo, RetryInfo}
        engine.may_start.set()
        assert (await watch.read()).status == SERVING
        assert await code_of(getattr(target.stub, method)(ONE)) is grpc.StatusCode.OK
        assert engine.starts == 2
        watch.cancel()


async def test_the_log_says_why_calls_are_refused_while_the_engine_is_dead(tmp_path: Path) -> None:
    engine = MortalEngine()

    async def is_refused() -> bool:
        return await code_of(target.stub.GenerateAll(ONE)) is grpc.StatusCode.UNAVAILABLE

    with logging_to(tmp_path / "log") as log:
        async with serving(engine) as target:
            engine.may_start.clear()
            engine.dead.set()
            await until(is_refused, "the engine has been found dead")
            call = target.stub.GenerateAll(ONE, metadata=[("x-request-id", "late")])
            assert await code_of(call) is grpc.StatusCode.UNAVAILABLE
            engine.may_start.set()
        await until(lambda: bool(log.ends("late")), "it is logged")
        (line,) = log.ends("late")
    assert line["cause"] == "the engine was dead, and has not started again"


async def test_a_call_that_fails_does_not_make_the_engine_a_dead_one() -> None:
    engine = MortalEngine(Script(fail_after=1))
    async with serving(engine) as target:
        for _ in range(5):
            assert await code_of(target.stub.GenerateAll(LONG)) is grpc.StatusCode.INTERNAL
        assert (await target.stub.GetModel(pb.GetModelRequest())).name
    assert engine.starts == 1


async def test_an_engine_that_is_silent_and_does_not_answer_is_dead() -> None:
    class HangingEngine(MortalEngine):
        async def check(self) -> None:
            if self.running:
                await asyncio.Event().wait()

    engine = HangingEngine(Script(hang_after=2))
    async with serving(engine, engine_timeout=0.1) as target:
        assert await code_of(target.stub.GenerateAll(LONG)) is grpc.StatusCode.UNAVAILABLE
        await until(lambda: engine.starts == 2, "it is started again")


async def test_an_engine_that_does_not_even_begin_and_does_not_answer_is_dead() -> None:
    class StuckEngine(MortalEngine):
        async def events(self, prepared: Any) -> Any:
            if self.starts == 1:
                await asyncio.Event().wait()
            async for event in super().events(prepared):
                yield event

        async def check(self) -> None:
            if self.starts == 1 and self.stuck:
                await asyncio.Event().wait()

        stuck = False

    engine = StuckEngine()
    async with serving(engine, engine_timeout=0.2) as target:
        engine.stuck = True
        assert await code_of(target.stub.GenerateAll(ONE)) is grpc.StatusCode.UNAVAILABLE
        await until(lambda: engine.starts == 2, "it is started again")


async def test_an_engine_that_starts_but_produces_nothing_ends_the_start() -> None:
    class MuteEngine(MortalEngine):
        async def check(self) -> None:
            await asyncio.Event().wait()

    with pytest.raises(EngineDiedError, match="no token within"):
        async with serving(MuteEngine(), engine_timeout=0.1):
            pass


async def test_an_engine_that_has_too_much_to_do_is_alive() -> None:
    class FullEngine(MortalEngine):
        async def check(self) -> None:
            if self.failing:
                raise EngineOverloadedError("full")

        failing = False

    engine = FullEngine(Script(fail_after=1))
    async with serving(engine) as target:
        engine.failing = True
        for _ in range(3):
            assert await code_of(target.stub.GenerateAll(LONG)) is grpc.StatusCode.INTERNAL
    assert engine.starts == 1


async def test_an_engine_that_is_silent_but_answers_is_alive() -> None:
    engine = MortalEngine(Script(hang_after=2))
    async with serving(engine, engine_timeout=0.05) as target:
        assert await code_of(target.stub.GenerateAll(LONG, timeout=0.6)) is grpc.StatusCode.DEADLINE_EXCEEDED
    assert engine.starts == 1


async def test_an_engine_that_works_for_calls_is_alive_although_its_check_hangs() -> None:
    class BusyEngine(MortalEngine):
        async def check(self) -> None:
            if self.running:
                await asyncio.Event().wait()

        async def events(self, prepared: Any) -> Any:
            async for event in super().events(prepared):
                if prepared.request.max_tokens == 1:
                    raise EngineFailedError("this one only")
                yield event

    engine = BusyEngine(Script(token_delay=0.01))
    async with serving(engine, engine_timeout=0.6) as target:
        busy = asyncio.ensure_future(code_of(target.stub.GenerateAll(pb.GenerationRequest(text="x", max_tokens=100))))
        await until(lambda: engine.running == 1, "it runs")
        assert await code_of(target.stub.GenerateAll(ONE)) is grpc.StatusCode.INTERNAL
        assert await busy is grpc.StatusCode.OK
    assert engine.starts == 1


@asynccontextmanager
async def dying(engine: MortalEngine, **settings: Any) -> AsyncIterator[Target]:
    """Serves for the length of the context, which ends with `EngineDiedError`."""
    died = False
    try:
        async with serving(engine, **settings) as target:
            yield target
            await asyncio.Event().wait()
    except EngineDiedError:
        died = True
    assert died
    assert asyncio.current_task().cancelling() == 0  # type: ignore[union-attr]


@pytest.mark.parametrize("error", [EngineUnavailableError("no model"), RuntimeError("a bug")])
async def test_an_engine_that_cannot_be_restarted_ends_the_server(error: Exception) -> None:
    engine = MortalEngine()
    async with dying(engine) as target:
        engine.start_error = error
        engine.dead.set()
        assert await code_of(target.stub.GenerateAll(ONE)) is grpc.StatusCode.INTERNAL


async def test_the_server_ends_if_the_settings_say_so() -> None:
    engine = MortalEngine()
    async with dying(engine, engine_death="exit") as target:
        engine.dead.set()
        assert await code_of(target.stub.GenerateAll(ONE)) is grpc.StatusCode.INTERNAL
    assert engine.starts == 1


async def test_an_engine_that_does_not_stop_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "STOP_TIMEOUT", 0.05)
    engine = MortalEngine()
    async with dying(engine) as target:
        engine.stops = False
        engine.dead.set()
        assert await code_of(target.stub.GenerateAll(ONE)) is grpc.StatusCode.INTERNAL
    for task in asyncio.all_tasks():
        if "__aexit__" in str(task.get_coro()):
            task.cancel()


async def test_the_command_starts_a_dead_engine_again() -> None:
    async with command(*SCRIPTED, "--script", '{"die_after": 2}') as process:
        _, address = await ready_line(process)
        async with connected(address) as target:
            codes: set[grpc.StatusCode] = set()
            while len(codes) < 2 or grpc.StatusCode.OK not in codes:
                codes.add(await code_of(target.stub.GenerateAll(ONE, wait_for_ready=True)))
            assert codes <= {grpc.StatusCode.OK, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE}
            assert process.returncode is None


async def test_the_command_exits_with_a_status_if_the_settings_say_so() -> None:
    async with command(
        *SCRIPTED, "--script", '{"die_after": 1}', "--engine-death", "exit", "--withdraw-window", "0"
    ) as process:
        _, address = await ready_line(process)
        async with connected(address) as target:
            assert await code_of(target.stub.GenerateAll(ONE)) is grpc.StatusCode.OK
            assert await code_of(target.stub.GenerateAll(ONE)) is grpc.StatusCode.INTERNAL
        _, err = await asyncio.wait_for(process.communicate(), 20)
        assert process.returncode == 1
        assert err.decode().strip().splitlines()[-1] == "flywheel-server: the engine died"
