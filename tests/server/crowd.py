"""Callers of an admission, and a clock that tests set."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from flywheel_server.access.callers import Caller
from flywheel_server.admission import Admission, Place

from tests.serving import settled


class Clock:
    """A clock that shows what a test has set."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def queued(
    admission: Admission, samples: int, caller: Caller, time_remaining: float | None = None
) -> AsyncIterator[Place]:
    """Gives a call a place in the queue, and releases it at the end of the context."""
    place = admission.join(samples, caller, time_remaining)
    finished = False
    try:
        yield place
        finished = True
    finally:
        place.release(finished=finished)


class Crowd:
    """The callers of an admission, by name, and which of them have been admitted."""

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
        """Makes a call, which waits or has been admitted when this returns."""
        self._leave[name] = asyncio.Event()

        async def stay() -> None:
            async with queued(self.admission, samples, Caller(of, priority), time_remaining) as place:
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
        """Raises the error that ended the wait of a call."""
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


async def learn(people: Crowd, clock: Clock, *seconds: float) -> None:
    for each in seconds:
        await people.come("teacher")
        clock.now += each
        await people.leave("teacher")
