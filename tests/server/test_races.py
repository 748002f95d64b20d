"""Things that happen at the same moment: no slot is lost, nothing waits forever, and each call ends in an allowed way."""

import asyncio
import random
from collections import Counter
from collections.abc import Coroutine
from contextlib import aclosing
from typing import Any

import grpc
import grpc.aio
import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server import server
from flywheel_server.access.callers import Caller
from flywheel_server.admission import Admission
from flywheel_server.admission_control import LocalAdmissionControl
from flywheel_server.delivery import Delivery, ReaderPolicy, SampleBuffer, SampleCollector
from flywheel_server.engines.base import EngineUnavailableError
from flywheel_server.engines.scripted import Script
from flywheel_server.errors import DeadlineExceededError, ServerFullError, UnauthenticatedError
from flywheel_server.generations import Generation, Generations
from flywheel_server.messages import GenerationRequest

from tests.pulled import PulledEngine
from tests.server.crowd import queued
from tests.serving import Target, drained, serving, until

ROUNDS = 1000
PATIENCE = 30.0
STREAMS = 0.7
"""The share of calls that are streams; the others are answered with a single message."""
CALLER = Caller("team", max_concurrent=10, tokens_per_minute=10**9)


async def hops(number: int) -> None:
    """Lets the event loop run so many iterations."""
    for _ in range(number):
        await asyncio.sleep(0)


class DelayedEngine(PulledEngine):
    """Pauses for a random time before, between and after its events."""

    def __init__(self, chance: random.Random, script: Script | None = None) -> None:
        super().__init__(script)
        self.chance = chance

    async def events(self, prepared: Any) -> Any:
        await hops(self.chance.randrange(3))
        try:
            # Without `aclosing`, the work of a call that was cancelled would end a little after the call.
            async with aclosing(super().events(prepared)) as events:
                async for event in events:
                    yield event
                    await hops(self.chance.randrange(3))
        finally:
            await hops(self.chance.randrange(3))


class Race:
    """The parts of a server without the wire, so that a thousand rounds are quick."""

    def __init__(self, seed: int, max_concurrent: int = 2, script: Script | None = None) -> None:
        self.chance = random.Random(seed)
        self.engine = DelayedEngine(self.chance, script)
        self.admission = Admission(max_concurrent, max_queued=100)
        self.open()
        self.delivery = Delivery(ReaderPolicy(max_bytes=1000, when_full="wait", timeout=60))
        self.outcomes: Counter[str] = Counter()

    def open(self) -> None:
        """Takes calls, also after the generations have been closed."""
        self.generations = Generations(self.engine, LocalAdmissionControl(self.admission))
        self.generations.open()

    async def call(self, num_samples: int = 1, time_remaining: float | None = None, tokens: int = 2) -> None:
        """Makes a call, and counts how it ended."""
        request = GenerationRequest(text="x", max_tokens=tokens, num_samples=num_samples)
        collector = SampleCollector(lambda: None)
        written: list[Any] = []

        async def write(message: Any) -> None:
            await hops(self.chance.randrange(2))
            written.append(message)

        async def deliver(generation: Generation) -> None:
            if self.chance.random() < STREAMS:
                await self.delivery.deliver(generation, SampleBuffer(), lambda: hops(self.chance.randrange(2)), write)
            else:
                await generation.run(collector)

        try:
            await self.generations.run(request, CALLER, time_remaining, deliver)
        except (DeadlineExceededError, EngineUnavailableError, UnauthenticatedError) as error:
            self.outcomes[type(error).__name__] += 1
        except asyncio.CancelledError:
            self.outcomes["cancelled"] += 1
            raise
        else:
            assert len(written) + len(collector.finished) == num_samples
            self.outcomes["finished"] += 1

    def begin(self, call: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        return asyncio.create_task(call)

    async def end(self, *tasks: asyncio.Task[None]) -> None:
        """Ends a round: waits for its calls, and checks that each has ended in an allowed way, and that nothing is left."""
        async with asyncio.timeout(PATIENCE):
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                assert result is None or isinstance(result, asyncio.CancelledError), repr(result)
        inside = (self.admission.active, self.admission.queued, self.generations.active, self.generations.queued)
        assert inside == (0, 0, 0, 0)
        assert self.engine.running == 0


async def test_a_cancel_against_the_grant_of_a_place() -> None:
    race = Race(seed=1)
    for _ in range(ROUNDS):
        holder = race.begin(race.call(num_samples=2))
        await hops(race.chance.randrange(12))
        waiter, next_one = race.begin(race.call(num_samples=race.chance.choice([1, 2]))), race.begin(race.call())
        await hops(race.chance.randrange(25))
        waiter.cancel()
        await race.end(holder, waiter, next_one)
    assert race.outcomes["cancelled"] > ROUNDS / 10
    assert race.outcomes["finished"] > 2 * ROUNDS


async def test_a_cancel_against_the_finish() -> None:
    race = Race(seed=2)
    for _ in range(ROUNDS):
        calls = [race.begin(race.call()) for _ in range(3)]
        await hops(race.chance.randrange(30))
        for call in race.chance.sample(calls, 2):
            call.cancel()
            await hops(race.chance.randrange(3))
        await race.end(*calls)
    assert race.outcomes["cancelled"] > ROUNDS / 10
    assert race.outcomes["finished"] > ROUNDS


async def test_a_deadline_against_the_finish() -> None:
    race = Race(seed=3, max_concurrent=3)
    limit = 0.0008
    for _ in range(ROUNDS):
        finished = race.outcomes["finished"]
        calls = [race.begin(race.call(tokens=3, time_remaining=race.chance.random() * limit)) for _ in range(4)]
        await race.end(*calls)
        # As long as a call takes on this machine now.
        limit *= 0.95 if race.outcomes["finished"] - finished > 1 else 1.05
    assert race.outcomes.keys() <= {"finished", "DeadlineExceededError"}
    assert min(race.outcomes["finished"], race.outcomes["DeadlineExceededError"]) > ROUNDS / 10


async def test_a_drain_against_the_start() -> None:
    race = Race(seed=4)
    for _ in range(ROUNDS):
        race.open()
        calls = []
        for _ in range(4):
            calls.append(race.begin(race.call(tokens=3)))
            await hops(race.chance.randrange(6))
        async with asyncio.timeout(PATIENCE):
            await race.generations.close(race.chance.choice([0, 0, 0.0002, 5]))
        await race.end(*calls)
    assert race.outcomes.keys() <= {"finished", "EngineUnavailableError"}
    assert min(race.outcomes.values()) > ROUNDS / 10


async def test_a_revocation_against_cancel_deadline_and_finish() -> None:
    race = Race(seed=5)
    for _ in range(ROUNDS):
        limits = race.chance.choices([None, 0.0005], k=3)
        calls = [race.begin(race.call(time_remaining=limit)) for limit in limits]
        await hops(race.chance.randrange(30))
        race.generations.revoke({CALLER.name})
        await hops(race.chance.randrange(2))
        calls[0].cancel()
        await race.end(*calls)
    assert race.outcomes["UnauthenticatedError"] > ROUNDS / 10


async def one_call(target: Target, chance: random.Random, seen: Counter[str]) -> None:
    """Makes a call over the wire that may be cancelled at any moment, or have too little time."""
    request = pb.GenerationRequest(text="x", max_tokens=chance.randrange(1, 6), num_samples=chance.randrange(1, 4))
    method = getattr(target.stub, chance.choice(["Generate", "GenerateDeltas", "GenerateAll"]))
    timeout = chance.choice([None, None, chance.random() * 0.05])
    call = method(request, timeout=timeout)
    reading = asyncio.ensure_future(drained(call))
    if chance.random() < 0.4:
        await asyncio.sleep(chance.random() * 0.02)
        call.cancel()
    try:
        await reading
        seen["OK"] += 1
    except grpc.aio.AioRpcError as error:
        seen[error.code().name] += 1
    except asyncio.CancelledError:
        seen["CANCELLED"] += 1


async def test_over_the_wire_no_place_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Admission] = []

    class Seen(Admission):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(server, "Admission", Seen)
    chance = random.Random(6)
    seen: Counter[str] = Counter()
    engine = DelayedEngine(chance, Script(token_delay=0.0002))
    async with serving(engine, max_concurrent=6, max_queued=12) as target:
        async with asyncio.timeout(PATIENCE):
            for _ in range(ROUNDS // 25):
                await asyncio.gather(*(one_call(target, chance, seen) for _ in range(25)))
        (admission,) = made
        await until(lambda: (admission.active, admission.queued, engine.running) == (0, 0, 0), "nothing is left")
        await target.stub.GenerateAll(pb.GenerationRequest(text="x", max_tokens=1, num_samples=6))
    assert sum(seen.values()) == ROUNDS
    assert seen.keys() <= {"OK", "CANCELLED", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"}
    assert min(seen["OK"], seen["CANCELLED"], seen["DEADLINE_EXCEEDED"], seen["RESOURCE_EXHAUSTED"]) > 10, seen


async def test_no_place_is_lost_to_calls_that_are_refused() -> None:
    admission = Admission(2, max_queued=1)
    admission.set_capacity(2, 3)
    chance = random.Random(7)

    async def visit() -> None:
        await hops(chance.randrange(3))
        try:
            async with queued(admission, chance.choice([1, 2]), Caller("", priority=chance.randrange(3))) as place:
                await hops(chance.randrange(3))
                await place.admitted(chance.randrange(3))
                await hops(chance.randrange(4))
        except ServerFullError:
            pass

    async with asyncio.timeout(PATIENCE):
        for _ in range(ROUNDS):
            visits = [asyncio.create_task(visit()) for _ in range(6)]
            await hops(chance.randrange(6))
            chance.choice(visits).cancel()
            for ending in await asyncio.gather(*visits, return_exceptions=True):
                assert ending is None or isinstance(ending, asyncio.CancelledError), repr(ending)
            assert (admission.active, admission.queued) == (0, 0)
