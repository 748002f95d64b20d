"""Time in which the server runs, by which it measures how long others take.

A process may be stopped (SIGSTOP, a debugger, a frozen cgroup, a suspended machine), or native code may hold up its event loop.
When the process goes on, everything that it waited for is late by the clock of the system, although the others may have done
their part long ago, and the process has not looked. So such a gap counts for nobody, neither in a timeout nor in a measurement.

What is promised to others by the clock of the system, such as the deadline of a caller or the lease of a gateway, goes by that.
"""

import asyncio
import threading
from collections.abc import Callable, Collection
from contextlib import AbstractAsyncContextManager, suppress
from types import TracebackType
from typing import Any, Final

TICK: Final = 0.1
"""Seconds between two looks at how much time has passed."""

MAX_GAP: Final = 0.25
"""Seconds between two looks that count at most: a longer gap is one in which the event loop did not run."""


class Clock:
    """The running time of an event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._counted = 0.0
        self._looked_at = loop.time()
        self._tick()

    def time(self) -> float:
        """Return the seconds that the event loop has run since the clock was made."""
        gap = self.loop.time() - self._looked_at
        # Not with `min`, which takes twice as long, and each call asks several times.
        return self._counted + (min(MAX_GAP, gap))

    def call_later(self, seconds: float, callback: Callable[[], None]) -> "Timer":
        """Call back when the event loop has run for so many seconds more."""
        return Timer(self, seconds, callback)

    def _tick(self) -> None:
        self._counted = self.time()
        self._looked_at = self.loop.time()
        self.loop.call_later(TICK, self._tick)


class Timer:
    """A callback to come, which `cancel` prevents."""

    def __init__(self, clock: Clock, seconds: float, callback: Callable[[], None]) -> None:
        self._clock = clock
        self._due = clock.time() + seconds
        self._callback = callback
        self._was_late = False
        self._arm(seconds)

    def cancel(self) -> None:
        """Do not call back."""
        self._handle.cancel()

    def _arm(self, seconds: float) -> None:
        self._fires_at = self._clock.loop.time() + seconds
        self._handle = self._clock.loop.call_later(seconds, self._look)

    def _look(self) -> None:
        remaining = self._due - self._clock.time()
        if not self._was_late and self._clock.loop.time() - self._fires_at > MAX_GAP:
            # The event loop has just begun to run again, so what has arrived meanwhile comes first: once, as it may be slow.
            self._was_late = True
            remaining = max(remaining, TICK)
        if remaining > 0:
            self._arm(remaining)
        else:
            self._callback()


_thread = threading.local()


def clock() -> Clock:
    """Return the clock of the running event loop."""
    loop = asyncio.get_running_loop()
    known: Clock | None = getattr(_thread, "clock", None)
    if known is None or known.loop is not loop:
        known = _thread.clock = Clock(loop)
    return known


def now() -> float:
    """Return the seconds on the clock of the running event loop."""
    return clock().time()


def timeout(seconds: float) -> AbstractAsyncContextManager[asyncio.Timeout]:
    """Raise `TimeoutError` from the context when it has lasted for so many seconds, as `asyncio.timeout` does."""
    return _Timeout(seconds)


class _Timeout(AbstractAsyncContextManager[asyncio.Timeout]):
    # No `asynccontextmanager`: CPython 3.11.7 crashes if such a context is cancelled twice within others of its kind.

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._scope = asyncio.timeout(None)

    async def __aenter__(self) -> asyncio.Timeout:
        scope = await self._scope.__aenter__()
        self._timer = clock().call_later(self._seconds, lambda: expire(scope))
        return scope

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._timer.cancel()
        await self._scope.__aexit__(kind, error, traceback)


def expire(scope: asyncio.Timeout) -> None:
    """End the context of an `asyncio.timeout` now, unless it is ending already."""
    if not scope.expired():
        scope.reschedule(asyncio.get_running_loop().time())


async def wait(futures: Collection[asyncio.Future[Any]], seconds: float) -> None:
    """Return when all futures are done, after so many seconds at the latest."""
    with suppress(TimeoutError):
        async with timeout(seconds):
            await asyncio.wait(futures)


async def sleep(seconds: float) -> None:
    """Return after so many seconds; with 0, give way once, as `asyncio.sleep` does."""
    if seconds <= 0:
        await asyncio.sleep(0)
        return
    with suppress(TimeoutError):
        async with timeout(seconds):
            await asyncio.Event().wait()
