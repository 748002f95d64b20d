"""A clock that stops while the server does not run, for timeouts and measurements of how long others take.

A process may be suspended (SIGSTOP, a debugger, a frozen cgroup, a suspended machine), or native code may block its event loop.
By the system's clock, everything that the process waited for is late afterwards, even if it arrived long ago and the process
could not notice. So running time leaves such gaps out, apart from their first `MAX_GAP` seconds.

The deadline of a caller and the lease of a gateway are promised in system time, and are measured in it.
"""

import asyncio
import threading
from collections.abc import Callable, Collection
from contextlib import AbstractAsyncContextManager, suppress
from types import TracebackType
from typing import Any, Final

TICK: Final = 0.1
"""Seconds between two updates of a clock."""

MAX_GAP: Final = 0.25
"""Seconds that count at most between two updates. If more have passed, the event loop did not run for a while."""


class Clock:
    """The running time of an event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._counted = 0.0
        self._updated_at = loop.time()
        self._tick()

    def time(self) -> float:
        """Returns the seconds that the event loop has run since the clock was created."""
        gap = self.loop.time() - self._updated_at
        return self._counted + min(MAX_GAP, gap)

    def call_later(self, seconds: float, callback: Callable[[], None]) -> "Timer":
        """Calls back when the event loop has run for so many more seconds."""
        return Timer(self, seconds, callback)

    def _tick(self) -> None:
        self._counted = self.time()
        self._updated_at = self.loop.time()
        self.loop.call_later(TICK, self._tick)


class Timer:
    """A scheduled callback, which `cancel` prevents."""

    def __init__(self, clock: Clock, seconds: float, callback: Callable[[], None]) -> None:
        self._clock = clock
        self._due = clock.time() + seconds
        self._callback = callback
        self._was_late = False
        self._arm(seconds)

    def cancel(self) -> None:
        """Prevents the callback."""
        self._handle.cancel()

    def _arm(self, seconds: float) -> None:
        self._fires_at = self._clock.loop.time() + seconds
        self._handle = self._clock.loop.call_later(seconds, self._fire)

    def _fire(self) -> None:
        remaining = self._due - self._clock.time()
        if not self._was_late and self._clock.loop.time() - self._fires_at > MAX_GAP:
            # The event loop did not run until now. What has arrived meanwhile is handled first, but only once: the loop may
            # stay slow.
            self._was_late = True
            remaining = max(remaining, TICK)
        if remaining > 0:
            self._arm(remaining)
        else:
            self._callback()


_thread = threading.local()


def clock() -> Clock:
    """Returns the clock of the running event loop."""
    loop = asyncio.get_running_loop()
    known: Clock | None = getattr(_thread, "clock", None)
    if known is None or known.loop is not loop:
        known = _thread.clock = Clock(loop)
    return known


def now() -> float:
    """Returns the seconds on the clock of the running event loop."""
    return clock().time()


def timeout(seconds: float) -> AbstractAsyncContextManager[asyncio.Timeout]:
    """Returns a context that ends with `TimeoutError` after so many seconds, as `asyncio.timeout` does."""
    return _Timeout(seconds)


class _Timeout(AbstractAsyncContextManager[asyncio.Timeout]):
    # Not an `asynccontextmanager`: CPython 3.11.7 crashes if nested contexts of that kind are cancelled twice.

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
    """Ends the context of an `asyncio.timeout` now, unless it is ending already."""
    if not scope.expired():
        scope.reschedule(asyncio.get_running_loop().time())


async def wait(futures: Collection[asyncio.Future[Any]], seconds: float) -> None:
    """Returns when all futures are done, or after so many seconds."""
    with suppress(TimeoutError):
        async with timeout(seconds):
            await asyncio.wait(futures)


async def sleep(seconds: float) -> None:
    """Returns after so many seconds; with 0, yields to the event loop once, as `asyncio.sleep` does."""
    if seconds <= 0:
        await asyncio.sleep(0)
        return
    with suppress(TimeoutError):
        async with timeout(seconds):
            await asyncio.Event().wait()
