"""The generations that are under way: each within its deadline, counted, and held to the first promise of the contract."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Final

from flywheel_server.engines.base import Engine, EngineFailedError, EngineUnavailableError, Event, Started, TextDelta
from flywheel_server.errors import DeadlineExceededError
from flywheel_server.messages import GenerationRequest, GenerationResponseSample

Events = AsyncIterator[TextDelta | GenerationResponseSample]

DEADLINE_MARGIN: Final = 0.05
"""The share of the remaining time, and at most so many seconds, by which the server ends a call before its deadline.

The caller's own timer fires at the deadline and drops whatever comes later; only an earlier status reaches it with details.
"""


class Generations:
    """Runs requests on the engine. `queued` waits for the engine's attention, `active` has it."""

    def __init__(self, engine: Engine) -> None:
        self.queued = 0
        self.active = 0
        self._engine = engine
        self._stopped = False
        self._deadlines: set[asyncio.Timeout] = set()
        self._one_has_left = asyncio.Event()

    async def drain(self, timeout: float) -> None:  # noqa: ASYNC109 - not the caller's, but that of the generations
        """Gives the generations under way `timeout` seconds to finish, and ends the others with `EngineUnavailableError`."""
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await self._all_left()
        finally:
            self._stopped = True
            for deadline in self._deadlines:
                if not deadline.expired():
                    deadline.reschedule(asyncio.get_running_loop().time())
            await self._all_left()

    async def _all_left(self) -> None:
        while self._deadlines:
            self._one_has_left.clear()
            await self._one_has_left.wait()

    @asynccontextmanager
    async def run(self, request: GenerationRequest, time_remaining: float | None) -> AsyncIterator[Events]:
        """Gives the events of the request for the length of the context; leaving it stops the work.

        `time_remaining` is in seconds; when it is over, `DeadlineExceededError` is raised from within the context.
        """
        generation = _Generation(self, request.num_samples)
        deadline = asyncio.timeout(_within(time_remaining))
        self._deadlines.add(deadline)
        try:
            async with (
                deadline,
                aclosing(self._engine.generate(request)) as events,
                aclosing(generation.watch(events)) as watched,
            ):
                yield watched
        except TimeoutError as error:
            if not deadline.expired():
                raise
            if self._stopped:
                raise EngineUnavailableError("the server is stopping") from error
            raise DeadlineExceededError("IN_GENERATION" if generation.started else "IN_QUEUE") from error
        finally:
            generation.leave()
            self._deadlines.remove(deadline)
            self._one_has_left.set()


def _within(time_remaining: float | None) -> float | None:
    if time_remaining is None:
        return None
    return time_remaining - min(DEADLINE_MARGIN, time_remaining * DEADLINE_MARGIN)


class _Generation:
    """One request on its way through the engine."""

    def __init__(self, generations: Generations, num_samples: int) -> None:
        self.started = False
        self._generations = generations
        self._unfinished = set(range(num_samples))
        generations.queued += 1

    async def watch(self, events: AsyncIterator[Event]) -> AsyncGenerator[TextDelta | GenerationResponseSample, None]:
        """Passes the events on; raises `EngineFailedError` unless each sample finishes once, and none more."""
        async for event in events:
            if isinstance(event, Started):
                self._start()
                continue
            if event.index not in self._unfinished:
                raise EngineFailedError(f"sample {event.index} was not asked for or had finished")
            if isinstance(event, GenerationResponseSample):
                self._unfinished.remove(event.index)
            yield event
        if self._unfinished:
            raise EngineFailedError(f"samples {sorted(self._unfinished)} did not finish")

    def _start(self) -> None:
        if self.started:
            raise EngineFailedError("the generation was started twice")
        self.started = True
        self._generations.queued -= 1
        self._generations.active += 1

    def leave(self) -> None:
        if self.started:
            self._generations.active -= 1
        else:
            self._generations.queued -= 1
