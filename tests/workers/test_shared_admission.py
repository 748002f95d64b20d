"""The admission that workers share: this process has both ends of each socket pair."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest
from flywheel_server.access.callers import ANYBODY, Caller
from flywheel_server.admission import Admission
from flywheel_server.admission_control import quotas_for
from flywheel_server.engines.base import EngineModel
from flywheel_server.errors import DeadlineExceededError, QuotaExceededError, ServerFullError
from flywheel_server.messages import GenerationRequest, GenerationResponseSample
from flywheel_server.workers import wire
from flywheel_server.workers.shared_admission import SharedAdmissionControl
from flywheel_server.workers.shared_calls import SharedCalls
from flywheel_server.workers.wire import Connection
from pydantic_core import from_json, to_json

from tests.serving import until

if TYPE_CHECKING:
    from flywheel_server.access.quotas import Quotas

TWO = Caller("two", max_concurrent=2)
METERED = Caller("metered", tokens_per_minute=100)


class Parent:
    """What the parent has: one admission, one set of quotas."""

    def __init__(self) -> None:
        self.admission = Admission(2, max_queued=1)
        self.quotas: Quotas = quotas_for(self.admission)
        self.calls: list[SharedCalls] = []

    @property
    def is_empty(self) -> bool:
        left = [each._entries or each._places or each._reservations for each in self.calls]
        return (self.admission.active, self.admission.queued) == (0, 0) and not any(left)

    @asynccontextmanager
    async def worker(self, tokenizers: int = 0) -> AsyncIterator[SharedAdmissionControl]:
        """Gives the admission control of a worker, which is gone after the context."""
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        handlers: dict[str, Any] = {"capacity": self.admission.set_capacity}
        parent_end = Connection(handlers, lambda: None)
        calls = SharedCalls(self.quotas, self.admission, parent_end)
        handlers |= calls.handlers
        self.calls.append(calls)
        answers: dict[str, Any] = {}
        worker_end = Connection(answers, lambda: None)
        control = SharedAdmissionControl(worker_end)
        answers |= {"admitted": control.admit, "refused": control.refuse}
        await loop.create_connection(lambda: parent_end, sock=ours)
        await loop.create_connection(lambda: worker_end, sock=theirs)
        control.set_capacity(EngineModel("m", "e", 100, False, "raw", tokenizers=tokenizers))
        try:
            yield control
        finally:
            await worker_end.close()
            await parent_end.close()
            calls.release_all()


def request(max_tokens: int = 10, num_samples: int = 1) -> GenerationRequest:
    return GenerationRequest(text="x", max_tokens=max_tokens, num_samples=num_samples)


async def run(  # noqa: PLR0917 - as few of them as a test needs
    control: SharedAdmissionControl,
    caller: Caller = ANYBODY,
    asked: GenerationRequest | None = None,
    time_remaining: float | None = None,
    used: int = 0,
    end: asyncio.Event | None = None,
) -> None:
    """Runs a call as `Generations` does, until the event."""
    lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    lost.add_done_callback(lambda done: done.cancelled() or done.exception())
    async with control.acquire(asked or request(), caller, time_remaining) as (usage, place):
        place.call_if_evicted(lost.set_exception)
        await asyncio.sleep(0)
        await place.admitted(0, time_remaining)
        if used:
            usage.count(GenerationResponseSample(
                text="", generated_tokens=used, finished=1.0, finish_reason="stop", index=0, prompt_tokens=0
            ))  # fmt: skip
        if end:
            await end.wait()


@pytest.mark.parametrize("tokenizers", [0, 2])
async def test_the_calls_of_two_workers_share_one_admission(tokenizers: int) -> None:
    parent = Parent()
    async with parent.worker(tokenizers) as one, parent.worker(tokenizers) as two:
        end = asyncio.Event()
        calls = []
        for here, control in enumerate((one, two, one), 1):
            calls.append(asyncio.create_task(run(control, end=end)))
            await until(lambda here=here: parent.admission.active + parent.admission.queued == here, "it has come")  # type: ignore[misc]
        assert (parent.admission.active, parent.admission.queued) == (2, 1)
        with pytest.raises(ServerFullError):
            await run(two)
        first = asyncio.create_task(run(two, Caller("first", priority=5), end=end))
        with pytest.raises(ServerFullError):
            await calls.pop()
        calls[0].cancel()
        end.set()
        await asyncio.gather(first, calls[1])
        await until(lambda: parent.is_empty, "all is given back")


@pytest.mark.parametrize("tokenizers", [0, 2])
async def test_quotas_are_shared_and_used_tokens_count(tokenizers: int) -> None:
    parent = Parent()
    async with parent.worker(tokenizers) as one, parent.worker(tokenizers) as two:
        end = asyncio.Event()
        calls = [asyncio.create_task(run(control, TWO, end=end)) for control in (one, two)]
        await until(lambda: parent.admission.active == 2, "both run")
        with pytest.raises(QuotaExceededError) as caught:
            await run(two, TWO)
        assert (caught.value.caller, caught.value.quota) == ("two", "max_concurrent 2")
        end.set()
        await asyncio.gather(*calls)
        await run(one, METERED, request(90), used=20)
        await run(two, METERED, request(80), used=60)
        with pytest.raises(QuotaExceededError) as caught:
            await run(one, METERED, request(30))
        assert caught.value.retry_delay == pytest.approx(6.0, abs=1.0)
        await until(lambda: parent.is_empty, "all is given back")


@pytest.mark.parametrize("tokenizers", [0, 2])
async def test_a_call_that_needs_no_slots_waits_for_its_quota_only(tokenizers: int) -> None:
    parent = Parent()
    async with parent.worker(tokenizers) as one, parent.worker(tokenizers) as two:
        end = asyncio.Event()
        calls = [asyncio.create_task(run(one, end=end)) for _ in range(2)]
        await until(lambda: parent.admission.active == 2, "no slot is free")
        for _ in range(2):
            async with two.acquire(request(1), METERED, None) as (usage, place):
                await place.joined()
                assert (parent.admission.active, parent.admission.queued) == (2, 1)
                usage.set_prompt_tokens(60)
        with pytest.raises(QuotaExceededError):
            async with two.acquire(request(1), METERED, None) as (_, place):
                await place.joined()
        end.set()
        await asyncio.gather(*calls)
        await until(lambda: parent.is_empty, "all is given back")
    assert parent.admission.service_times.of("metered") is None


@pytest.mark.parametrize("tokenizers", [0, 2])
async def test_a_call_gets_the_quota_that_a_call_on_another_worker_has_just_released(tokenizers: int) -> None:
    parent = Parent()
    one_at_a_time = Caller("one", max_concurrent=1)
    async with parent.worker(tokenizers) as one, parent.worker(tokenizers) as two:
        async with one.acquire(request(), one_at_a_time, None) as (_, place):
            await place.admitted(0)
            # Makes the event loop read from this worker first, as it may do after it was busy.
            two.connection.send("capacity", None, None)
        async with two.acquire(request(), one_at_a_time, None) as (_, place):
            await place.admitted(0)
        await until(lambda: parent.is_empty, "all is given back")


async def test_a_deadline_that_cannot_be_met_is_refused_on_each_worker() -> None:
    parent = Parent()
    for _ in range(10):
        parent.admission.service_times.add("", 100.0)
    async with parent.worker() as one, parent.worker() as two:
        end = asyncio.Event()
        calls = [asyncio.create_task(run(one, end=end)) for _ in range(2)]
        await until(lambda: parent.admission.active == 2, "both run")
        with pytest.raises(DeadlineExceededError) as caught:
            await run(two, time_remaining=5.0)
        assert caught.value.reason == "IN_QUEUE"
        end.set()
        await asyncio.gather(*calls)


async def test_a_worker_that_is_gone_holds_nothing() -> None:
    parent = Parent()
    end = asyncio.Event()
    async with parent.worker() as one:
        async with parent.worker() as two:
            calls = [asyncio.create_task(run(two, TWO, end=end)) for _ in range(2)]
            await until(lambda: parent.admission.active == 2, "both run")
        assert parent.is_empty
        await run(one, Caller("two", max_concurrent=2), request(num_samples=2))
        end.set()
        await asyncio.gather(*calls)


async def test_nobody_waits_for_a_parent_that_is_gone() -> None:
    parent = Parent()
    async with parent.worker() as one:
        end = asyncio.Event()
        calls = [asyncio.create_task(run(one, end=end)) for _ in range(3)]
        await until(lambda: parent.admission.queued == 1, "one waits")
        one.end(lambda: RuntimeError("gone"))
        with pytest.raises(RuntimeError, match="gone"):
            await calls[2]
        with pytest.raises(RuntimeError, match="gone"):
            await run(one)
        end.set()
        await asyncio.gather(*calls[:2])


async def test_a_call_that_never_asks_for_room_leaves_nothing_behind() -> None:
    parent = Parent()
    async with parent.worker() as at_once, parent.worker(2) as later:
        for control in (at_once, later):
            with suppress(KeyError):
                async with control.acquire(request(), TWO, None):
                    raise KeyError
        await run(later, TWO, request(num_samples=2))
        await until(lambda: parent.is_empty, "all is given back")


@pytest.mark.parametrize("error", [
    DeadlineExceededError("IN_QUEUE"), QuotaExceededError("ü", "max_concurrent 1", None), ServerFullError(0.25)
])  # fmt: skip
def test_each_refusal_travels_as_it_is(error: Exception) -> None:
    arrived = wire.to_error(from_json(to_json(wire.from_error(error))))
    assert (type(arrived), arrived.args) == (type(error), error.args)
    assert type(error) in wire.REFUSALS


def test_there_is_a_case_above_for_each_refusal() -> None:
    assert len(wire.REFUSALS) == 3
