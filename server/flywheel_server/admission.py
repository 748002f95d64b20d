"""Who may start now, who waits, and who is turned away."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Final

from flywheel_server.errors import DeadlineExceededError, ServerFullError

UNKNOWN: Final = 1.0
"""Seconds that a call is said to take, to those who are turned away before it is known."""

ENOUGH: Final = 8
"""Samples that must have finished before anything is made of how long they took."""

LATEST: Final = 64
"""Samples, the last ones, whose median is the service time: it follows what comes, and no single call can spoil it."""


@dataclass(eq=False, slots=True)
class _Waiter:
    samples: int
    turn: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Admission:
    """Lets at most `max_concurrent` samples be generated at a time, and at most `max_queued` wait for that.

    Who waits is served by descending priority, and within one first come, first served: nobody overtakes one who waits for
    much. A call with more samples than may ever run at a time has the server for itself. Where no more may wait, one of a
    higher priority takes the place of the last one of the lowest.

    How long a wait is comes from Little's law: of `max_concurrent` samples that take `service_time` each, one ends every
    `service_time / max_concurrent` seconds.

    Arguments:
        max_concurrent: Samples that are generated at a time.
        max_queued: Samples that wait.
        clock: Seconds that only ever increase.
    """

    def __init__(self, max_concurrent: int, max_queued: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.active = 0
        """Samples that have been let in."""
        self.queued = 0
        """Samples that wait."""
        self._most = self._max_concurrent = max_concurrent
        self._max_queued = max_queued
        self._clock = clock
        self._times: deque[float] = deque(maxlen=LATEST)
        self._next_place = 0.0
        # An insertion-ordered set of waiters for each priority: one that gives up leaves at once, wherever it stands.
        self._waiters: dict[int, dict[_Waiter, None]] = {}

    @property
    def service_time(self) -> float | None:
        """Seconds that calls lately had their room for; None before enough have finished."""
        return median(self._times) if len(self._times) >= ENOUGH else None

    def fit(self, slots: int | None) -> None:
        """Lets in no more than an engine with so many slots works on: who waits for one had better wait here, in order."""
        self._max_concurrent = self._most if slots is None else min(self._most, slots)
        self._let_in()

    @asynccontextmanager
    async def turn(self, samples: int, *, priority: int = 0, time_remaining: float | None = None) -> AsyncIterator[None]:
        """Waits for room for so many samples, and holds it. Cancelling the wait leaves the queue.

        Raises:
            DeadlineExceededError: The wait would last longer than `time_remaining` (seconds; None is no bound).
            ServerFullError: Too many wait.
        """
        samples = min(samples, self._max_concurrent)
        ahead = self._ahead_of(priority)
        if ahead or self.active + samples > self._max_concurrent:
            self._check_deadline(samples, ahead, time_remaining)
            self._find_place(samples, ahead)
            await self._wait(samples, priority)
        else:
            self.active += samples
        began = self._clock()
        try:
            yield
        finally:
            self._release(samples)
        # Only those who came to their end: how soon others gave up tells nothing of how long it takes.
        self._times.extend([self._clock() - began] * samples)

    def _ahead_of(self, priority: int) -> int:
        return sum(waiter.samples for other, waiters in self._waiters.items() if other >= priority for waiter in waiters)

    def _check_deadline(self, samples: int, ahead: int, time_remaining: float | None) -> None:
        wanting = self.active + ahead + samples - self._max_concurrent
        # Before anything is known, only what has passed already cannot be met.
        wait = wanting * (self.service_time or 0.0) / self._max_concurrent
        if time_remaining is not None and wait > time_remaining:
            raise DeadlineExceededError("IN_QUEUE")

    def _find_place(self, samples: int, ahead: int) -> None:
        if ahead + samples > self._max_queued:
            raise ServerFullError(self._retry_delay(samples))
        while self.queued + samples > self._max_queued:
            lowest = min(self._waiters)
            last = next(reversed(self._waiters[lowest]))
            self._remove(last, lowest)
            if not last.turn.cancelled():
                last.turn.set_exception(ServerFullError(self._retry_delay(last.samples)))

    async def _wait(self, samples: int, priority: int) -> None:
        waiter = _Waiter(samples)
        waiters = self._waiters.setdefault(priority, {})
        waiters[waiter] = None
        self.queued += samples
        try:
            await waiter.turn
        except asyncio.CancelledError:
            if waiter.turn.cancelled():
                self._remove(waiter, priority)
                # It may have been what those behind it waited for.
                self._let_in()
            elif waiter.turn.exception() is None:
                # Its turn came in the moment of the cancel.
                self._release(samples)
            raise

    def _remove(self, waiter: _Waiter, priority: int) -> None:
        waiters = self._waiters.get(priority, {})
        if waiter in waiters:
            del waiters[waiter]
            self.queued -= waiter.samples
        if not waiters:
            self._waiters.pop(priority, None)

    def _release(self, samples: int) -> None:
        self.active -= samples
        self._let_in()

    def _let_in(self) -> None:
        while self._waiters:
            priority = max(self._waiters)
            waiter = next(iter(self._waiters[priority]))
            if waiter.turn.cancelled():
                # It is about to leave.
                self._remove(waiter, priority)
                continue
            if self.active + waiter.samples > self._max_concurrent:
                return
            self._remove(waiter, priority)
            self.active += waiter.samples
            waiter.turn.set_result(None)

    def _retry_delay(self, samples: int) -> float:
        """Returns the seconds until there should be a place in the queue, a later one for each that asks."""
        now = self._clock()
        per_sample = (UNKNOWN if self.service_time is None else self.service_time) / self._max_concurrent
        # No later than when all who are here now will have left.
        last = now + (self.active + self.queued) * per_sample
        self._next_place = min(max(now, self._next_place) + samples * per_sample, last)
        return self._next_place - now
