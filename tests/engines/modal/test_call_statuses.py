"""Each status of each request about a call on Modal: an error that passes ends no call; an error that lasts reaches the caller.

The docstrings of `flywheel_server.engines.modal.remote_call` and `flywheel_server.engines.modal.remote_class` have the tables.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import nullcontext
from itertools import product
from typing import Any

import grpc
import grpc.aio
import modal
import pytest
import structlog
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.engines.modal import remote_call, remote_class
from flywheel_server.engines.scripted import Script
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from grpclib import Status

from tests.modal_cloud import ModalCloud, scripted
from tests.server.test_errors import details_of
from tests.serving import Target, code_of, serving, until
from tests.statuses import STATUSES
from tests.thorough import further

APP = "statuses"
UNREACHABLE = {Status.CANCELLED, Status.UNKNOWN, Status.DEADLINE_EXCEEDED, Status.INTERNAL, Status.UNAVAILABLE}
LIMITED = {Status.RESOURCE_EXHAUSTED}
CONFLICT = {Status.FAILED_PRECONDITION, Status.ABORTED}
GONE = {Status.NOT_FOUND}
REFUSED = {
    Status.PERMISSION_DENIED,
    Status.UNAUTHENTICATED,
    Status.INVALID_ARGUMENT,
    Status.OUT_OF_RANGE,
    Status.UNIMPLEMENTED,
}
BROKEN = {Status.ALREADY_EXISTS, Status.DATA_LOSS}
CODES = {
    **dict.fromkeys(UNREACHABLE | CONFLICT, grpc.StatusCode.UNAVAILABLE),
    **dict.fromkeys(LIMITED, grpc.StatusCode.RESOURCE_EXHAUSTED),
    **dict.fromkeys(GONE | REFUSED, grpc.StatusCode.FAILED_PRECONDITION),
    **dict.fromkeys(BROKEN, grpc.StatusCode.INTERNAL),
}
"""The code with which a call ends, by the status with which Modal goes on refusing it."""

CLASSES = ["Model", "Flywheel"]


@pytest.fixture(scope="module")
def deployed(cloud: ModalCloud) -> ModalCloud:
    scripted.deploy(cloud, APP, Script(token_delay=0.02))
    return cloud


@pytest.fixture(autouse=True)
def calm(deployed: ModalCloud, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets tries follow each other fast, so that many fit into a test."""
    monkeypatch.setattr("flywheel_server.engines.modal.retries.FIRST_DELAY", 0.05)
    monkeypatch.setattr("flywheel_server.engines.modal.retries.MAX_DELAY", 0.2)
    monkeypatch.setattr("flywheel_server.engines.modal.errors.DEFAULT_RETRY_DELAY", 0.05)
    monkeypatch.setattr("flywheel_server.engines.modal.remote_call.POLL_TIMEOUT", 0.3)
    monkeypatch.setattr("flywheel_server.engines.modal.remote_call.SILENCE_BEFORE_POLL_SECONDS", 0.0)
    yield
    deployed.calm()


@pytest.fixture(scope="module")
async def targets(deployed: ModalCloud) -> AsyncIterator[dict[str, Target]]:
    """A server for each class, which has found it."""
    async with serving(scripted.engine(APP, "Model")) as model, serving(scripted.engine(APP, "Flywheel")) as flywheel:
        found = {"Model": model, "Flywheel": flywheel}
        for target in found.values():
            await target.stub.GenerateAll(request())
        yield found


def request(max_tokens: int = 3) -> pb.GenerationRequest:
    return pb.GenerationRequest(text="hello", max_tokens=max_tokens)


def test_the_tables_have_all_statuses() -> None:
    assert set(CODES) == set(Status) - {Status.OK}
    for table in (remote_call.__doc__ or "", remote_class.__doc__ or ""):
        assert not [status.name for status in CODES if status.name not in table]


@pytest.mark.parametrize("status", STATUSES)
async def test_a_poll_that_fails_for_a_while_ends_no_call(
    deployed: ModalCloud, targets: dict[str, Target], status: Status
) -> None:
    # Modal's client makes some requests four times before it gives up.
    fault = deployed.disturb("FunctionGetOutputs", status=status, times=40)
    calls = [targets[class_name].stub.GenerateDeltas(request(30)) for class_name in CLASSES for _ in range(3)]
    codes = await asyncio.gather(*(code_of(call) for call in calls))
    assert codes == [grpc.StatusCode.OK] * 6
    assert fault.befallen > 0


@pytest.mark.parametrize("status", STATUSES)
async def test_a_poll_that_goes_on_failing_ends_a_call_only_if_the_error_is_permanent(
    deployed: ModalCloud, targets: dict[str, Target], monkeypatch: pytest.MonkeyPatch, status: Status
) -> None:
    monkeypatch.setattr("flywheel_server.engines.modal.retries.CONFIRMATION_SECONDS", 0.3)
    fault = deployed.disturb("FunctionGetOutputs", status=status)
    before = len(deployed.calls)
    passes = status in UNREACHABLE | LIMITED | CONFLICT
    # Text that arrives proves that the call is there, whatever Modal says: only a call that sends none can count as gone.
    classes = CLASSES if passes else ["Flywheel"]
    calls = [targets[class_name].stub.GenerateAll(request(60 if passes else 3000)) for class_name in classes]
    reading = [asyncio.ensure_future(code_of(call)) for call in calls]
    if passes:
        ended = ["done", "done"]
        await until(lambda: [made.state for made in deployed.calls[before:]] == ended, "they have ended on Modal")
        assert fault.befallen >= 4
        assert not reading[1].done()
        fault.end()
        assert await asyncio.gather(*reading) == [grpc.StatusCode.OK] * 2
        return
    expected = grpc.StatusCode.UNAVAILABLE if status in GONE else CODES[status]
    assert await asyncio.gather(*reading) == [expected]
    await until(
        lambda: {made.state for made in deployed.calls[before:]} == {"cancelled"},
        "it is cancelled: nobody knows whether it has ended",
    )


@pytest.mark.parametrize("status", STATUSES)
async def test_a_call_that_modal_does_not_accept(deployed: ModalCloud, targets: dict[str, Target], status: Status) -> None:
    async def codes() -> set[grpc.StatusCode]:
        calls = (code_of(targets[class_name].stub.GenerateAll(request())) for class_name in CLASSES)
        return set(await asyncio.gather(*calls))

    is_refusal = status in GONE | REFUSED | CONFLICT
    fault = deployed.disturb("FunctionMap", status=status)
    assert await codes() == {CODES[status]}
    # If a status does not tell whether Modal accepted the call, Modal's client repeats the request; the call is made once.
    assert fault.befallen == 2 * (3 if is_refusal else 4 if status in UNREACHABLE else 1)
    fault.end()
    fault = deployed.disturb("FunctionMap", status=status, times=2)
    passes = is_refusal or status in UNREACHABLE
    assert await codes() == {grpc.StatusCode.OK if passes else CODES[status]}
    assert fault.befallen == 2
    assert await codes() == {grpc.StatusCode.OK}


async def test_a_limit_is_told_at_once_with_the_time_that_modal_says(deployed: ModalCloud, targets: dict[str, Target]) -> None:
    for rpc in ("FunctionMap", "ClassGet"):
        limit = deployed.limit(rpc, retry_after=30.0)
        began = time.monotonic()
        async with serving(scripted.engine(APP)) as fresh:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await fresh.stub.GenerateAll(request())
        assert time.monotonic() - began < 15
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert details_of(caught.value)[RetryInfo].retry_delay.seconds == 30
        limit.end()


@pytest.mark.parametrize("retry_after", [0.5, *further([None])])
async def test_limited_polls_end_none_of_30_streams(
    deployed: ModalCloud, targets: dict[str, Target], retry_after: float | None
) -> None:
    limit = deployed.limit("FunctionGetOutputs", retry_after=retry_after)
    codes = await asyncio.gather(*(code_of(targets["Model"].stub.GenerateDeltas(request(100))) for _ in range(30)))
    assert codes == [grpc.StatusCode.OK] * 30
    assert limit.befallen > 0


async def test_two_failed_polls_do_not_end_a_call_if_text_has_arrived_between_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flywheel_server.engines.modal.retries.CONFIRMATION_SECONDS", 0.3)
    monkeypatch.setattr(remote_call, "SILENCE_BEFORE_POLL_SECONDS", 0.2)
    polls = 0

    class Accepted:
        @property
        def get(self) -> Any:
            return self

        async def aio(self, timeout: float) -> str:  # noqa: ASYNC109 - Modal's
            nonlocal polls
            polls += 1
            if polls < 3:
                raise modal.exception.NotFoundError("there is no such call")
            return "done"

    async def spawn() -> Any:
        return Accepted()

    call = remote_call.RemoteCall(spawn(), nullcontext, 600)
    polling = asyncio.create_task(call.polled_result(asyncio.Semaphore()))
    await until(lambda: polls == 1, "a poll has failed")
    for _ in range(10):
        call.note_events()
        await asyncio.sleep(0.05)
    assert polls == 1
    assert await polling == "done"


@pytest.mark.parametrize("status", STATUSES)
async def test_a_cancel_is_repeated_until_modal_has_it(
    deployed: ModalCloud, targets: dict[str, Target], status: Status
) -> None:
    before = len(deployed.calls)
    deployed.disturb("FunctionCallCancel", status=status, times=60)
    with structlog.testing.capture_logs() as logged:
        calls = [targets[class_name].stub.GenerateDeltas(request(3000)) for class_name in CLASSES for _ in range(5)]
        reading = [asyncio.ensure_future(code_of(call)) for call in calls]
        await until(lambda: sum(call.state == "running" for call in deployed.calls[before:]) == 10, "they run")
        for call in calls:
            call.cancel()
        await asyncio.gather(*reading, return_exceptions=True)
        await until(lambda: {call.state for call in deployed.calls[before:]} == {"cancelled"}, "all are cancelled")
        await until(lambda: sum("delayed cancels over" in line["event"] for line in logged) == 2, "it is in the log")
    # Each of the two engines logs a line when its first cancel is delayed, and a line with the count when all are over.
    assert [line["event"] for line in logged].count("cancels delayed") == 2
    through = [line for line in logged if line["event"] == "delayed cancels over"]
    assert sum(line["made"] for line in through) == 10
    assert [line["given_up"] for line in through] == [0, 0]


async def test_a_cancel_ends_with_its_call(deployed: ModalCloud, targets: dict[str, Target]) -> None:
    before = len(deployed.calls)
    refusal = deployed.limit("FunctionCallCancel")
    call = targets["Flywheel"].stub.GenerateAll(request(100))
    await until(lambda: len(deployed.calls) > before and deployed.calls[before].state == "running", "it runs")
    call.cancel()
    await until(lambda: deployed.calls[before].state == "done", "it has ended by itself")
    tries = refusal.befallen
    await asyncio.sleep(0.6)  # several tries would have come
    assert refusal.befallen <= tries + 1


@pytest.mark.thorough
async def test_cancels_that_modal_never_takes_are_counted_when_the_engine_stops(
    deployed: ModalCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flywheel_server.engines.modal.engine.STOP_GRACE", 0.5)
    before = len(deployed.calls)
    deployed.limit("FunctionCallCancel")
    with structlog.testing.capture_logs() as logged:
        async with serving(scripted.engine(APP)) as target:
            reading = [asyncio.ensure_future(code_of(target.stub.GenerateDeltas(request(150)))) for _ in range(3)]
            await until(lambda: sum(call.state == "running" for call in deployed.calls[before:]) == 3, "they run")
        await asyncio.gather(*reading, return_exceptions=True)
    (line,) = [line for line in logged if line["event"] == "calls not cancelled"]
    assert line["calls"] == 3
    await until(lambda: {call.state for call in deployed.calls[before:]} == {"done"}, "they have ended by themselves")


async def test_a_stopping_engine_tries_again_within_its_grace(deployed: ModalCloud) -> None:
    before = len(deployed.calls)
    deployed.disturb("FunctionCallCancel", status=Status.RESOURCE_EXHAUSTED, times=9)
    async with serving(scripted.engine(APP)) as target:
        reading = [asyncio.ensure_future(code_of(target.stub.GenerateDeltas(request(3000)))) for _ in range(3)]
        await until(lambda: sum(call.state == "running" for call in deployed.calls[before:]) == 3, "they run")
    await asyncio.gather(*reading, return_exceptions=True)
    assert {call.state for call in deployed.calls[before:]} == {"cancelled"}


async def test_a_call_whose_caller_goes_while_it_is_spawned_is_cancelled(
    deployed: ModalCloud, targets: dict[str, Target]
) -> None:
    before = len(deployed.calls)
    faults: list[dict[str, Any]] = [
        {"delay": 0.5},
        *({"status": one, "times": 1} for one in (Status.ABORTED, Status.UNAVAILABLE)),
    ]
    for count, (fault, class_name) in enumerate(product(faults, CLASSES), start=1):
        spawning = deployed.disturb("FunctionMap", **fault)
        call = targets[class_name].stub.GenerateAll(request(3000))
        await until(lambda: spawning.befallen == 1, "it is being spawned")  # noqa: B023 - it is awaited here
        call.cancel()
        await until(lambda: len(deployed.calls) == before + count, "it is spawned")  # noqa: B023 - as above
        spawning.end()
    await until(lambda: {call.state for call in deployed.calls[before:]} == {"cancelled"}, "all are cancelled")


@pytest.mark.parametrize("rpc", ["ClassGet", *further(["FunctionGet", "FunctionBindParams"])])
@pytest.mark.parametrize("status", STATUSES)
async def test_a_class_that_is_not_found(deployed: ModalCloud, targets: dict[str, Target], rpc: str, status: Status) -> None:
    deployed.disturb(rpc, status=status)
    async with serving(scripted.engine(APP), health_interval=30) as fresh:
        assert await code_of(fresh.stub.GenerateAll(request())) is CODES[status]
        # The other server has found the class before, so Modal's answer to the call decides.
        refusal = deployed.disturb("FunctionMap", status=Status.NOT_FOUND, times=1)
        assert await code_of(targets["Model"].stub.GenerateAll(request())) is grpc.StatusCode.OK
        assert refusal.befallen == 1
        deployed.calm()
        if status in GONE | REFUSED | CONFLICT:
            deployed.disturb(rpc, status=status, times=1)
        assert await code_of(fresh.stub.GenerateAll(request())) is grpc.StatusCode.OK


@pytest.mark.parametrize("status", STATUSES)
async def test_stats_that_modal_does_not_tell(deployed: ModalCloud, targets: dict[str, Target], status: Status) -> None:
    deployed.disturb("FunctionGetCurrentStats", status=status)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await targets["Model"].stub.GetStats(pb.GetStatsRequest(), timeout=10)
    assert caught.value.code() is CODES[status]
    assert ErrorInfo in details_of(caught.value)
    assert await code_of(targets["Model"].stub.GenerateAll(request())) is grpc.StatusCode.OK
    deployed.calm()
    assert await targets["Model"].stub.GetStats(pb.GetStatsRequest())
