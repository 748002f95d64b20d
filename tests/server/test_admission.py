"""Who is let in, who waits and for how long, and who is turned away with what to do about it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import grpc.aio
import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.access.callers import Caller
from flywheel_server.admission import DEFAULT_SERVICE_TIME, MAX_CALLERS, MAX_CALLS, MIN_CALLS, Admission, ServiceTimes
from flywheel_server.engines.base import EngineModel
from flywheel_server.engines.scripted import Script, ScriptedEngine
from flywheel_server.errors import DeadlineExceededError, ServerFullError
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.access.test_quotas import keys_for
from tests.server.test_errors import METHODS, details_of, details_of_a_deadline
from tests.serving import Target, drained, serving, settled, until

ONE = pb.GenerationRequest(text="x", max_tokens=1)


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Crowd:
    """Callers of an admission, by name, and who of them has been let in."""

    def __init__(self, admission: Admission) -> None:
        self.admission = admission
        self.inside: list[str] = []
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._leave: dict[str, asyncio.Event] = {}

    async def come(
        self,
        name: str,
        samples: int = 1,
        *,
        tokens: int = 0,
        of: str = "",
        priority: int = 0,
        time_remaining: float | None = None,
        prompt_is_read: asyncio.Event | None = None,
    ) -> None:
        """Comes, and waits or is inside after this."""
        self._leave[name] = asyncio.Event()

        async def stay() -> None:
            async with self.admission.queue(samples, Caller(of, priority), time_remaining) as place:
                if prompt_is_read:
                    await prompt_is_read.wait()
                await place.admitted(tokens, time_remaining)
                self.inside.append(name)
                await self._leave[name].wait()
                self.inside.remove(name)

        self._tasks[name] = asyncio.create_task(stay())
        await settled()
        if self._tasks[name].done():
            await self._tasks.pop(name)

    async def leave(self, name: str) -> None:
        self._leave[name].set()
        await self._tasks.pop(name)
        await settled()

    async def give_up(self, name: str) -> None:
        self._tasks[name].cancel()
        await asyncio.gather(self._tasks.pop(name), return_exceptions=True)
        await settled()

    async def rejected(self, name: str) -> None:
        """Raises what ended the wait of one who was turned away later."""
        async with asyncio.timeout(10):
            await self._tasks.pop(name)

    async def go_home(self) -> None:
        for name in list(self._tasks):
            await self.give_up(name)
        assert (self.admission.active, self.admission.queued) == (0, 0)


@asynccontextmanager
async def crowd(max_concurrent: int, max_queued: int = 100, clock: Callable[[], float] | None = None) -> AsyncIterator[Crowd]:
    people = Crowd(Admission(max_concurrent, max_queued, clock or Clock()))
    yield people
    await people.go_home()


async def test_first_come_first_served() -> None:
    async with crowd(2) as people:
        for name in "abcd":
            await people.come(name)
        assert people.inside == ["a", "b"]
        assert (people.admission.active, people.admission.queued) == (2, 2)
        await people.leave("b")
        assert people.inside == ["a", "c"]
        await people.leave("a")
        assert people.inside == ["c", "d"]


async def test_a_call_weighs_its_samples_and_nobody_overtakes_it() -> None:
    async with crowd(4) as people:
        await people.come("a", 3)
        await people.come("big", 3)
        await people.come("small", 1)
        assert people.inside == ["a"], "there is room for one, but it is not its turn"
        await people.leave("a")
        assert people.inside == ["big", "small"]


async def test_one_that_gives_up_lets_those_behind_it_in() -> None:
    async with crowd(4) as people:
        await people.come("a", 3)
        await people.come("big", 3)
        await people.come("small", 1)
        await people.give_up("big")
        assert people.inside == ["a", "small"]


async def test_a_call_with_more_samples_than_may_ever_run_has_the_server_for_itself() -> None:
    async with crowd(4) as people:
        await people.come("a")
        await people.come("huge", 9)
        assert people.inside == ["a"]
        await people.leave("a")
        assert people.inside == ["huge"]
        await people.come("b")
        assert people.inside == ["huge"]


async def test_a_higher_priority_is_served_first() -> None:
    async with crowd(1) as people:
        await people.come("a")
        await people.come("low")
        await people.come("high", priority=5)
        await people.come("high too", priority=5)
        await people.come("lowest", priority=-1)
        for expected in ("high", "high too", "low", "lowest"):
            await people.leave(people.inside[0])
            assert people.inside == [expected]


async def test_a_higher_priority_does_not_wait_for_a_large_call_of_a_lower_one() -> None:
    async with crowd(4) as people:
        await people.come("a", 3)
        await people.come("large", 4)
        await people.come("urgent", 1, priority=1)
        assert people.inside == ["a", "urgent"]


async def test_more_than_may_wait_are_turned_away() -> None:
    async with crowd(1, max_queued=3) as people:
        await people.come("a")
        await people.come("b", 1)
        await people.come("c", 1)
        await people.come("d", 1)
        with pytest.raises(ServerFullError):
            await people.come("e")
        await people.give_up("c")
        await people.come("f")
        assert people.admission.queued == 3


async def test_with_no_queue_who_cannot_start_is_turned_away() -> None:
    async with crowd(2, max_queued=0) as people:
        await people.come("a")
        await people.come("b")
        with pytest.raises(ServerFullError):
            await people.come("c")
        await people.leave("a")
        await people.come("c")
        assert people.inside == ["b", "c"]


async def learn(people: Crowd, clock: Clock, *seconds: float) -> None:
    for each in seconds:
        await people.come("teacher")
        clock.now += each
        await people.leave("teacher")


async def test_the_retry_delay_is_when_there_should_be_a_place_a_later_one_for_each() -> None:
    clock = Clock()
    async with crowd(4, max_queued=2, clock=clock) as people:
        await learn(people, clock, *[8] * MIN_CALLS)
        for name in "abcd":
            await people.come(name)
        await people.come("e", 2)
        delays = []
        for _ in range(9):
            with pytest.raises(ServerFullError) as caught:
                await people.come("f")
            delays.append(caught.value.retry_delay)
        # One of the four leaves every two seconds; after 12 seconds all six who are here have.
        assert delays == pytest.approx([2, 4, 6, 8, 10, 12, 12, 12, 12])
        clock.now += 100
        with pytest.raises(ServerFullError) as caught:
            await people.come("g", 2)
        assert caught.value.retry_delay == pytest.approx(4)


async def test_before_anything_is_known_the_retry_delay_is_a_guess() -> None:
    async with crowd(1, max_queued=0) as people:
        await people.come("a")
        with pytest.raises(ServerFullError) as caught:
            await people.come("b")
        assert caught.value.retry_delay == DEFAULT_SERVICE_TIME


async def test_a_deadline_that_cannot_be_met_is_refused_at_once() -> None:
    clock = Clock()
    async with crowd(2, clock=clock) as people:
        await learn(people, clock, *[10] * MIN_CALLS)
        for name in "abc":
            await people.come(name)
        # Every five seconds one leaves: after five it is c's turn, and after ten that of the next.
        with pytest.raises(DeadlineExceededError) as caught:
            await people.come("hasty", time_remaining=9.9)
        assert caught.value.reason == "IN_QUEUE"
        await people.come("patient", time_remaining=10.1)
        await people.come("urgent", time_remaining=5.1, priority=1)
        assert people.admission.queued == 3


async def test_a_deadline_that_has_passed_does_not_wait() -> None:
    async with crowd(1) as people:
        await people.come("a")
        with pytest.raises(DeadlineExceededError):
            await people.come("late", time_remaining=-0.1)
        await people.come("unbounded")
        assert people.admission.queued == 1


async def test_the_service_time_follows_what_is_measured() -> None:
    clock = Clock()
    async with crowd(2, clock=clock) as people:
        await learn(people, clock, *[10] * (MIN_CALLS - 1))
        assert people.admission.service_times.of("") is None
        await learn(people, clock, 10)
        assert people.admission.service_times.of("") == 10
        await learn(people, clock, 600)
        assert people.admission.service_times.of("") == 10, "one call does not spoil it"
        await learn(people, clock, *[20] * MAX_CALLS)
        assert people.admission.service_times.of("") == 20


def test_each_caller_has_a_service_time_of_its_own() -> None:
    times = ServiceTimes()
    for _ in range(MIN_CALLS):
        times.add("slow", 600)
    assert (times.of("slow"), times.of("quick")) == (600, None)
    for _ in range(MIN_CALLS):
        times.add("quick", 1)
    assert (times.of("slow"), times.of("quick")) == (600, 1)


def test_the_service_times_of_callers_who_come_no_more_are_forgotten() -> None:
    times = ServiceTimes()
    for caller in range(MAX_CALLERS + 1):
        for _ in range(MIN_CALLS):
            times.add(str(caller), 1)
    assert times.of("0") is None
    assert times.of("1") == times.of(str(MAX_CALLERS)) == 1


async def test_one_call_of_many_samples_is_one_call() -> None:
    clock = Clock()
    async with crowd(8, clock=clock) as people:
        await people.come("many", 8)
        clock.now += 60
        await people.leave("many")
        assert people.admission.service_times.of("") is None
        for number in range(16):
            await people.come(str(number), time_remaining=2)
        assert len(people.inside) == 8


@pytest.mark.parametrize("samples", [1, 8])
async def test_no_caller_sets_how_long_the_others_seem_to_take(samples: int) -> None:
    clock = Clock()
    async with crowd(8, clock=clock) as people:
        for _ in range(MAX_CALLS):
            await people.come("long", samples, of="heavy")
            clock.now += 600
            await people.leave("long")
        for number in range(16):
            await people.come(str(number), of="light", time_remaining=2)
        assert (len(people.inside), people.admission.queued) == (8, 8)


async def test_a_wait_behind_the_long_calls_of_another_is_as_long_as_those() -> None:
    clock = Clock()
    async with crowd(2, clock=clock) as people:
        for _ in range(MIN_CALLS):
            await people.come("long", of="heavy")
            clock.now += 600
            await people.leave("long")
        await people.come("a", of="heavy")
        await people.come("b", of="heavy")
        with pytest.raises(DeadlineExceededError):
            await people.come("hasty", of="light", time_remaining=100)
        await people.come("patient", of="light", time_remaining=1000)


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
        assert people.inside == ["a"], "there is room for the small one, but it is not its turn"
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


async def test_a_call_that_wants_more_than_the_context_has_the_engine_for_itself() -> None:
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
        await learn(people, clock, *[10] * MIN_CALLS)
        await people.come("a", tokens=100)
        await people.come("b", tokens=100)
        # Ten seconds for what runs, and half of the context for five more.
        with pytest.raises(DeadlineExceededError) as caught:
            await people.come("hasty", tokens=50, time_remaining=14.9)
        assert caught.value.reason == "IN_QUEUE"
        await people.come("patient", tokens=50, time_remaining=15.1)
        await people.come("urgent", tokens=50, priority=1, time_remaining=5.1)


async def test_more_than_may_wait_for_context_are_turned_away_with_when_to_come_back() -> None:
    clock = Clock()
    async with crowd_sharing(100, slots=2, max_queued=1, clock=clock) as people:
        await learn(people, clock, *[10] * MIN_CALLS)
        await people.come("a", tokens=100)
        await people.come("b", tokens=100)
        await people.come("c", tokens=1)
        with pytest.raises(ServerFullError) as caught:
            await people.come("d", tokens=1)
        assert caught.value.retry_delay == pytest.approx(10), "only one of two slots has the context to run"
        await people.come("e", tokens=1, priority=1)
        with pytest.raises(ServerFullError):
            await people.rejected("c")


async def test_one_that_gives_up_its_context_lets_those_behind_it_in() -> None:
    async with crowd_sharing(100) as people:
        await people.come("a", tokens=60)
        await people.come("large", tokens=80)
        await people.come("small", tokens=10)
        await people.give_up("large")
        assert people.inside == ["a", "small"]


async def test_who_waits_for_its_prompt_to_be_read_is_passed_but_keeps_its_place() -> None:
    async with crowd(1, max_queued=3) as people:
        is_read = asyncio.Event()
        await people.come("unread", prompt_is_read=is_read)
        await people.come("a")
        await people.come("b")
        assert people.inside == ["a"]
        assert people.admission.queued == 2
        is_read.set()
        await settled()
        await people.leave("a")
        assert people.inside == ["unread"], "it came first"
        await people.leave("unread")
        assert people.inside == ["b"]


async def test_while_its_prompt_is_read_a_call_holds_a_place_in_the_queue() -> None:
    async with crowd(1, max_queued=1) as people:
        is_read = asyncio.Event()
        await people.come("unread", prompt_is_read=is_read)
        await people.come("unread too", prompt_is_read=is_read)
        with pytest.raises(ServerFullError):
            await people.come("c")
        await people.come("urgent", priority=1)
        assert people.inside == ["urgent"]
        is_read.set()
        with pytest.raises(ServerFullError):
            await people.rejected("unread too")


async def test_those_who_give_up_do_not_count_for_the_service_time() -> None:
    clock = Clock()
    async with crowd(2, clock=clock) as people:
        await learn(people, clock, *[10] * MIN_CALLS)
        for _ in range(MAX_CALLS):
            await people.come("hasty")
            await people.give_up("hasty")
        assert people.admission.service_times.of("") == 10


async def test_a_higher_priority_finds_a_place_where_lower_ones_wait() -> None:
    async with crowd(2, max_queued=3) as people:
        await people.come("a", 2)
        await people.come("low", priority=-1)
        await people.come("low too", priority=-1)
        await people.come("middle")
        await people.come("high", priority=1)
        with pytest.raises(ServerFullError):
            await people.rejected("low too")
        assert people.admission.queued == 3
        for name in ("nobody", "nobody else"):
            with pytest.raises(ServerFullError):
                await people.come(name, 2)
        await people.come("highest", 2, priority=2)
        for name in ("low", "middle"):
            with pytest.raises(ServerFullError):
                await people.rejected(name)
        await people.leave("a")
        assert people.inside == ["highest"]
        await people.leave("highest")
        assert people.inside == ["high"]


async def full(target: Target, engine: ScriptedEngine, calls: int) -> AsyncExitStack:
    """Fills the server with calls that hang."""
    stack = AsyncExitStack()
    for _ in range(calls):
        call = target.stub.GenerateAll(pb.GenerationRequest(text="x", max_tokens=9))
        stack.callback(call.cancel)
    await until(lambda: engine.running == calls, "the server is full")
    return stack


@pytest.mark.parametrize("method", METHODS)
async def test_a_full_server_refuses_with_when_to_come_back(method: str) -> None:
    engine = ScriptedEngine(Script(hang_after=1))
    async with serving(engine, max_concurrent=2, max_queued=0) as target, await full(target, engine, 2):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await drained(getattr(target.stub, method)(ONE))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        details = details_of(caught.value)
        assert details[ErrorInfo].reason == "OVERLOADED"
        assert details[RetryInfo].retry_delay.ToMilliseconds() > 0


async def test_what_does_not_generate_never_queues() -> None:
    engine = ScriptedEngine(Script(hang_after=1))
    async with serving(engine, max_concurrent=1, max_queued=1) as target, await full(target, engine, 1):
        waiting = target.stub.GenerateAll(ONE)
        health = health_pb2_grpc.HealthStub(target.channel)

        async def queued() -> bool:
            return bool((await target.stub.GetStats(pb.GetStatsRequest())).queued == 1)

        await until(queued, "one waits")
        assert (await target.stub.GetModel(pb.GetModelRequest())).name
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING
        assert not waiting.done()


@pytest.mark.parametrize("method", METHODS)
async def test_who_waits_is_let_in_and_who_cancels_is_not(method: str) -> None:
    engine = ScriptedEngine(Script(hang_after=5))
    async with serving(engine, max_concurrent=1, max_queued=2) as target:
        holding = await full(target, engine, 1)
        leaving = target.stub.GenerateAll(ONE)
        staying = asyncio.ensure_future(drained(getattr(target.stub, method)(ONE)))

        async def queued(number: int) -> bool:
            return bool((await target.stub.GetStats(pb.GetStatsRequest())).queued == number)

        await until(lambda: queued(2), "both wait")
        leaving.cancel()
        await until(lambda: queued(1), "one has left")
        await holding.aclose()
        await staying


async def test_a_deadline_bounds_the_wait() -> None:
    engine = ScriptedEngine(Script(hang_after=1))
    async with serving(engine, max_concurrent=1) as target, await full(target, engine, 1):
        details = await details_of_a_deadline(lambda: target.stub.GenerateAll(ONE, timeout=0.3))
        assert details[ErrorInfo].reason == "IN_QUEUE"


async def test_no_more_are_let_in_than_the_engine_has_slots() -> None:
    async with crowd(10) as people:
        people.admission.set_capacity(2, None)
        for name in "abc":
            await people.come(name)
        assert people.inside == ["a", "b"]
        people.admission.set_capacity(None, None)
        await settled()
        assert people.inside == ["a", "b", "c"]
        people.admission.set_capacity(50, None)
        for name in "defghijk":
            await people.come(name)
        assert len(people.inside) == 10


async def test_the_queue_is_the_servers_where_the_engine_has_few_slots() -> None:
    class NarrowEngine(ScriptedEngine):
        def model(self) -> EngineModel:
            return replace(super().model(), slots=1)

    engine = NarrowEngine(Script(hang_after=1))
    async with serving(engine, max_queued=0) as target, await full(target, engine, 1):
        assert await target.stub.GenerateAll(ONE).code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_who_waits_for_context_is_served_by_priority_and_within_its_deadline(tmp_path: Path) -> None:
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
