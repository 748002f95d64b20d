"""Time in which the server does not run does not count: what was done in this time is not late.

Most tests hold up the event loop, as native code may. The last tests stop the process.
"""

import asyncio
import signal
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server import admission, public_limits, running_time
from flywheel_server.access.callers import ANYBODY
from flywheel_server.admission import Admission
from flywheel_server.delivery import Delivery, DeltaBuffer, ReaderPolicy, SampleBuffer
from flywheel_server.engines.base import EngineStats, EngineUnavailableError, TextDelta
from flywheel_server.engines.modal import reachability
from flywheel_server.engines.modal import retries as modal_retries
from flywheel_server.engines.scripted import Script, ScriptedEngine
from flywheel_server.health import Health
from flywheel_server.interceptors import methods
from flywheel_server.messages import GenerationResponseSample
from grpc_health.v1 import health_pb2

from tests.server.crowd import queued
from tests.server.http2_client import http2, prefixed
from tests.server.test_command import SCRIPTED, command, ready_line
from tests.server.test_delivery import Reader, Source
from tests.server.test_supervision import MortalEngine
from tests.serving import code_of, connected, serving, until

TIMEOUT = 0.6
HELD_UP = 0.7
WORK = 0.2
"""Seconds of work that begins before the event loop is held up, and is done when the loop runs again."""


def hold_up(seconds: float = HELD_UP) -> None:
    """Keeps the event loop from running for so many seconds, soon."""
    asyncio.get_running_loop().call_later(WORK / 2, time.sleep, seconds)


async def slow_write(_: Any) -> None:
    hold_up()
    await asyncio.sleep(WORK)


DELTA = TextDelta(0, "x", 1)
SAMPLE = GenerationResponseSample(text="x", generated_tokens=1, finished=1.0, finish_reason="stop")


POLICY = ReaderPolicy(max_bytes=10, when_full="wait", timeout=TIMEOUT)


class SlowReader(Reader):
    async def write(self, message: Any) -> None:
        await slow_write(message)


WAITS: dict[str, Callable[[], Awaitable[Any]]] = {
    "stream of deltas": lambda: Source(DELTA).deliver(DeltaBuffer(), SlowReader(), POLICY),
    "stream of samples": lambda: Source(SAMPLE).deliver(SampleBuffer(), SlowReader(), POLICY),
    "answer": lambda: Delivery(POLICY).deliver_one(Source(), None, slow_write),
}


@pytest.mark.parametrize("wait", WAITS)
async def test_a_reader_that_reads_while_the_server_is_held_up_is_not_slow(wait: str) -> None:
    await WAITS[wait]()


async def test_timeouts_and_timers_last_as_long_as_the_event_loop_runs() -> None:
    clock = running_time.clock()
    fired: list[str] = []
    clock.call_later(TIMEOUT, lambda: fired.append("timer"))
    clock.call_later(TIMEOUT, lambda: fired.append("cancelled")).cancel()
    began = clock.time()
    hold_up()

    async def last() -> None:
        async with running_time.timeout(TIMEOUT):
            await asyncio.sleep(WORK)
            assert not fired
            assert clock.time() - began < TIMEOUT
            await asyncio.Event().wait()

    with pytest.raises(TimeoutError):
        await last()
    assert clock.time() - began >= TIMEOUT
    await until(lambda: fired == ["timer"], "it comes")


@pytest.mark.thorough
async def test_a_loop_that_is_always_slow_does_not_put_a_timeout_off_forever() -> None:
    async def turn_slowly() -> None:
        async with running_time.timeout(TIMEOUT):
            for _ in range(10):
                time.sleep(2 * running_time.MAX_GAP)  # noqa: ASYNC251 - this is what it is about
                await asyncio.sleep(0)

    with pytest.raises(TimeoutError):
        await turn_slowly()


async def test_to_wait_and_to_sleep_last_as_long_as_the_event_loop_runs() -> None:
    hold_up()
    work = asyncio.ensure_future(asyncio.sleep(WORK))
    await running_time.wait({work}, TIMEOUT)
    assert work.done()
    began = running_time.now()
    hold_up()
    await running_time.sleep(TIMEOUT)
    assert running_time.now() - began >= TIMEOUT
    never = asyncio.get_running_loop().create_future()
    await running_time.wait({never}, WORK)
    assert not never.done()


async def test_a_timeout_passes_other_errors_and_cancels_on() -> None:
    with pytest.raises(KeyError):
        async with running_time.timeout(TIMEOUT):
            raise KeyError
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(WORK) as outer, running_time.timeout(60) as inner:
            await asyncio.Event().wait()
    assert (outer.expired(), inner.expired()) == (True, False)


async def test_an_engine_that_starts_meanwhile_has_started() -> None:
    class SlowEngine(ScriptedEngine):
        async def check(self) -> None:
            await slow_write(None)

    async with serving(SlowEngine(), engine_timeout=TIMEOUT) as target:
        assert await code_of(target.stub.GetModel(pb.GetModelRequest())) is grpc.StatusCode.OK


async def test_an_engine_that_answers_meanwhile_is_alive() -> None:
    class DoubtfulEngine(MortalEngine):
        checks = 0

        async def check(self) -> None:
            self.checks += 1
            if self.checks > 1:
                await slow_write(None)
                self.checks += 1

    engine = DoubtfulEngine(Script(fail_after=1))
    async with serving(engine, engine_timeout=TIMEOUT) as target:
        assert await code_of(target.stub.GenerateAll(pb.GenerationRequest(text="x", max_tokens=9))) is grpc.StatusCode.INTERNAL
        await until(lambda: engine.checks == 3, "it has answered")
        assert await code_of(target.stub.GetModel(pb.GetModelRequest())) is grpc.StatusCode.OK
    assert engine.starts == 1


async def test_an_engine_that_tells_meanwhile_how_it_is_stays_within_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    class LookedAtEngine(ScriptedEngine):
        looks = 0

        async def stats(self) -> EngineStats:
            self.looks += 1
            if self.looks == 2:
                await slow_write(None)
            return await super().stats()

        def is_reachable(self) -> bool:
            return False

    engine, health = LookedAtEngine(), Health()
    statuses: list[dict[str, int]] = []
    monkeypatch.setattr(health.servicer, "set", statuses.append)
    async with health.probing(engine, TIMEOUT):
        await until(lambda: engine.looks == 3, "it is looked at again")
        assert {status for each in statuses for status in each.values()} == {health_pb2.HealthCheckResponse.SERVING}


@pytest.mark.parametrize("path", ["/flywheel.v1.GenerationService/GetModel", "/grpc.health.v1.Health/Check"])
async def test_a_request_that_arrives_meanwhile_is_complete(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "REQUEST_TIMEOUT", TIMEOUT)
    monkeypatch.setattr(public_limits, "SLOT_TIMEOUT", TIMEOUT)
    message = prefixed(b"")
    async with serving(ScriptedEngine()) as target, http2(target.address) as client:
        stream = client.begin(path)
        await client.send(stream, message[:3])
        await slow_write(None)
        await client.send(stream, message[3:], end=True)
        assert await stream.status() == 0


async def test_service_times_leave_out_the_time_in_which_the_server_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "MIN_MEASURED_CALLS", 1)
    admitting = Admission(1, 0)
    async with queued(admitting, 1, ANYBODY) as place:
        await place.admitted(0)
        await slow_write(None)
    measured = admitting.service_times.of(ANYBODY.name)
    assert measured is not None
    assert measured < TIMEOUT


async def test_a_class_on_modal_is_not_doubted_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modal_retries, "CONFIRMATION_SECONDS", TIMEOUT)
    monkeypatch.setattr(reachability, "CONFIRMATION_SECONDS", TIMEOUT)
    known, policy = reachability.Reachability(), modal_retries.RetryPolicy(timeout=TIMEOUT)
    known.note_success()
    error = EngineUnavailableError("Modal does not answer")
    known.note_failure()
    policy.delay(error, is_transient=False)
    await slow_write(None)
    known.note_failure()
    policy.delay(error, is_transient=False)
    assert known.is_reachable


async def stopped(process: Process, seconds: float) -> None:
    """Stops the process for so many seconds."""
    process.send_signal(signal.SIGSTOP)
    await asyncio.sleep(seconds)
    process.send_signal(signal.SIGCONT)


async def ending(call: Any) -> grpc.StatusCode:
    """Reads the call to its end."""
    try:
        while await call.read() is not grpc.aio.EOF:
            pass
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


@pytest.mark.thorough
async def test_streams_and_a_drain_outlast_a_server_that_is_stopped() -> None:
    # 2 MB for each call: enough that the server waits for its reader when it is stopped.
    script = '{"text": "0123456789", "bytes_per_token": 20000}'
    options = ("--slow-reader-timeout", "1", "--drain-timeout", "2", "--log-level", "error")
    async with command(*SCRIPTED, "--script", script, *options) as process:
        _, address = await ready_line(process)
        async with connected(address, ("grpc.http2.bdp_probe", 0)) as target:
            request = pb.GenerationRequest(text="x", max_tokens=100)
            calls = [getattr(target.stub, method)(request) for method in ("Generate", "GenerateDeltas") for _ in range(20)]
            await asyncio.gather(*(call.read() for call in calls[20:]))
            await stopped(process, 1.5)
            assert {*await asyncio.gather(*(ending(call) for call in calls))} == {grpc.StatusCode.OK}
            # This stream is not read on, so that it has not ended when the signal comes.
            last = target.stub.GenerateDeltas(request)
            await last.read()
            process.send_signal(signal.SIGTERM)
            await stopped(process, 2.3)
            assert await ending(last) is grpc.StatusCode.OK
        await process.wait()


STARTING = """
import asyncio
from flywheel_server.engines.scripted import ScriptedEngine
from flywheel_server.server import serve
from flywheel_server.settings import Settings

class SlowEngine(ScriptedEngine):
    async def check(self):
        print("starting", flush=True)
        await asyncio.sleep(0.7)

async def main():
    async with serve(SlowEngine(), Settings(address="127.0.0.1:0", engine_timeout=1, withdraw_window=0)):
        print("ready", flush=True)

asyncio.run(main())
"""


async def test_an_engine_starts_although_the_server_is_stopped_meanwhile() -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", STARTING, stdout=PIPE, stderr=DEVNULL)
    assert process.stdout is not None
    assert await process.stdout.readline() == b"starting\n"
    await stopped(process, 1.3)
    assert await process.stdout.readline() == b"ready\n"
    assert await process.wait() == 0
