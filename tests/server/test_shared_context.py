"""Calls that wait for the context which all slots of an engine share."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.admission import MIN_MEASURED_CALLS
from flywheel_server.engines.scripted import Script, ScriptedEngine
from flywheel_server.errors import DeadlineExceededError, ServerFullError
from google.rpc.error_details_pb2 import ErrorInfo

from tests.access.test_quotas import keys_for
from tests.server.crowd import Clock, Crowd, crowd, learn
from tests.server.test_errors import details_of_a_deadline
from tests.serving import serving, until

ONE = pb.GenerationRequest(text="x", max_tokens=1)


@asynccontextmanager
async def crowd_sharing(
    tokens: int, *, slots: int = 8, max_queued: int = 100, clock: Callable[[], float] | None = None
) -> AsyncIterator[Crowd]:
    """Callers of an engine whose slots share so many tokens of context."""
    async with crowd(100, max_queued, clock) as people:
        people.admission.set_capacity(slots, tokens)
        yield people


async def test_the_context_is_given_out_first_come_first_served() -> None:
    async with crowd_sharing(100) as people:
        await people.come("a", tokens=60)
        await people.come("large", tokens=80)
        await people.come("small", tokens=10)
        assert people.inside == ["a"], "there is room for the small call, but the large one is first"
        await people.leave("a")
        assert people.inside == ["large", "small"]


async def test_the_context_goes_to_a_higher_priority_first() -> None:
    async with crowd_sharing(100) as people:
        await people.come("a", tokens=60, priority=-10)
        await people.come("large", tokens=100, priority=-10)
        await people.come("urgent", tokens=30, priority=100)
        assert people.inside == ["a", "urgent"], "a large call of a lower priority is not in its way"
        await people.come("urgent too", tokens=60, priority=100)
        await people.leave("urgent")
        assert people.inside == ["a"]
        await people.leave("a")
        assert people.inside == ["urgent too"]
        await people.leave("urgent too")
        assert people.inside == ["large"]


async def test_a_call_that_needs_more_than_the_context_runs_alone() -> None:
    async with crowd_sharing(100) as people:
        await people.come("a", tokens=10)
        await people.come("huge", tokens=1000)
        assert people.inside == ["a"]
        await people.leave("a")
        assert people.inside == ["huge"]
        await people.come("b", tokens=1)
        assert people.inside == ["huge"]


async def test_a_deadline_that_cannot_be_met_for_want_of_context_is_refused_at_once() -> None:
    clock = Clock()
    async with crowd_sharing(100, clock=clock) as people:
        await learn(people, clock, *[10] * MIN_MEASURED_CALLS)
        await people.come("a", tokens=100)
        await people.come("b", tokens=100)
        # The running call ends after ten seconds, and half of the context of "b" is free after five more.
        with pytest.raises(DeadlineExceededError) as caught:
            await people.come("hasty", tokens=50, time_remaining=14.9)
        assert caught.value.reason == "IN_QUEUE"
        await people.come("patient", tokens=50, time_remaining=15.1)
        await people.come("urgent", tokens=50, priority=1, time_remaining=5.1)


async def test_a_call_for_which_the_queue_has_no_place_is_refused_with_a_retry_delay() -> None:
    clock = Clock()
    async with crowd_sharing(100, slots=2, max_queued=1, clock=clock) as people:
        await learn(people, clock, *[10] * MIN_MEASURED_CALLS)
        await people.come("a", tokens=100)
        await people.come("b", tokens=100)
        await people.come("c", tokens=1)
        with pytest.raises(ServerFullError) as caught:
            await people.come("d", tokens=1)
        assert caught.value.retry_delay == pytest.approx(10), "only one of two slots has the context to run"
        await people.come("e", tokens=1, priority=1)
        with pytest.raises(ServerFullError):
            await people.rejected("c")


async def test_a_call_that_gives_up_lets_the_calls_behind_it_in() -> None:
    async with crowd_sharing(100) as people:
        await people.come("a", tokens=60)
        await people.come("large", tokens=80)
        await people.come("small", tokens=10)
        await people.give_up("large")
        assert people.inside == ["a", "small"]


async def test_calls_that_wait_for_context_are_served_by_priority_and_within_their_deadlines(tmp_path: Path) -> None:
    engine = ScriptedEngine(Script(shared_context_tokens=200, token_delay=0.005))
    served: list[str] = []
    file = tmp_path / "keys.json"
    with keys_for(file, low={"priority": -10}, high={"priority": 100}) as metadata:
        async with serving(engine, api_keys_file=str(file)) as target:

            async def call(name: str, max_tokens: int) -> None:
                request = pb.GenerationRequest(text="x", max_tokens=max_tokens)
                await target.stub.GenerateAll(request, metadata=metadata[name])
                served.append(f"{name} {max_tokens}")

            async def waiting(number: int) -> bool:
                stats = await target.stub.GetStats(pb.GetStatsRequest(), metadata=metadata["low"])
                return (stats.active, stats.queued, stats.backlog) == (1, number, 0)

            holder = asyncio.create_task(call("low", 199))
            await until(lambda: waiting(0), "it holds the whole context, and one of many slots")
            calls = []
            for number, (name, max_tokens) in enumerate([("low", 195), ("low", 2), ("high", 3), ("high", 4)], 1):
                calls.append(asyncio.create_task(call(name, max_tokens)))
                await until(lambda number=number: waiting(number), "the next one waits")  # type: ignore[misc]
            details = await details_of_a_deadline(lambda: target.stub.GenerateAll(ONE, timeout=0.3, metadata=metadata["low"]))
            assert details[ErrorInfo].reason == "IN_QUEUE"
            await asyncio.gather(holder, *calls)
    assert served[0] == "low 199"
    assert set(served[1:3]) == {"high 3", "high 4"}, "they came last"
    assert set(served[3:]) == {"low 195", "low 2"}
