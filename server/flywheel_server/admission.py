"""Who may start, who waits, and who is refused."""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from statistics import median
from typing import Final, Self

from flywheel_server import running_time
from flywheel_server.access.callers import Caller
from flywheel_server.errors import DeadlineExceededError, ServerFullError

DEFAULT_SERVICE_TIME: Final = 1.0
"""The service time in seconds that a RetryInfo assumes for a caller whose own is not known yet."""

MIN_CALLS: Final = 8
"""Calls of a caller that must have finished before its service time counts as known."""

MAX_CALLS: Final = 64
"""The service time of a caller is the median of so many calls, its last ones: it follows changes, and no one call spoils it."""

MAX_CALLERS: Final = 1024
"""Callers whose service times are remembered: those that finished a call last."""


class ServiceTimes:
    """How long the calls of each caller take once they have been admitted.

    Callers are measured separately: the long calls of one say nothing about how long those of another take.
    """

    def __init__(self) -> None:
        self._seconds: OrderedDict[str, deque[float]] = OrderedDict()
        self._medians: dict[str, float] = {}

    def add(self, caller: str, seconds: float) -> None:
        """Records that a call of the caller finished after so many seconds."""
        times = self._seconds.get(caller)
        if times is None:
            times = self._seconds[caller] = deque(maxlen=MAX_CALLS)
        self._seconds.move_to_end(caller)
        times.append(seconds)
        # Computed when somebody asks, as few calls do.
        self._medians.pop(caller, None)
        if len(self._seconds) > MAX_CALLERS:
            forgotten, _ = self._seconds.popitem(last=False)
            self._medians.pop(forgotten, None)

    def of(self, caller: str) -> float | None:
        """Returns the seconds that a call of the caller takes; None before enough have finished."""
        known = self._medians.get(caller)
        if known is None and len(times := self._seconds.get(caller, ())) >= MIN_CALLS:
            known = self._medians[caller] = median(times)
        return known


class Admission:
    """Admits as many calls as the engine can work on at a time, and queues a bounded number of others.

    The engine has two resources: samples that it generates at a time, and tokens of context that those share. A call waits
    until there is enough of both. Waiters are served by priority, highest first, and FIFO within a priority. A small call never
    overtakes a large one, but every call passes one whose prompt has not been read yet. A call that wants more than there ever
    is has the engine for itself. If no more may wait, a call takes the place of the last waiter of the lowest priority,
    provided that its own priority is higher.

    How long a wait is comes from Little's law: if calls hold `max_concurrent` samples and the mean of their service times is S
    seconds, one sample ends every S / max_concurrent seconds; and so for tokens of context. A caller whose service time is not
    known yet counts as one that takes no time, so that nobody is refused on a guess.

    Arguments:
        max_concurrent: Samples that are generated at a time.
        max_queued: Samples that may wait, besides those for which there are free slots.
        clock: Seconds that only ever increase, by default those in which the server runs.
    """

    def __init__(self, max_concurrent: int, max_queued: int, clock: Callable[[], float] = running_time.now) -> None:
        self.active = 0
        """Samples that have been let in."""
        self.queued = 0
        """Samples that wait."""
        self.service_times = ServiceTimes()
        self._most = self._max_concurrent = max_concurrent
        self._max_queued = max_queued
        self._max_tokens: int | None = None
        self._active_tokens = 0
        self._clock = clock
        self._next_place = 0.0
        self._samples_of: dict[str, int] = {}
        """Samples of each caller, waiting and let in."""
        # An insertion-ordered set of waiters for each priority: one that gives up leaves at once, wherever it stands.
        self._waiters: dict[int, dict[Place, None]] = {}

    def set_capacity(self, slots: int | None, context_tokens: int | None) -> None:
        """Caps concurrency at the engine's slots and tokens of shared context, so that calls queue here, in order.

        None is no limit.
        """
        self._max_concurrent = self._most if slots is None else min(self._most, slots)
        self._max_tokens = context_tokens
        self._let_in()

    def queue(self, samples: int, caller: Caller, time_remaining: float | None = None) -> "Place":
        """Returns a place in the queue for a call, which is taken for the length of its context.

        Leaving the context gives up the place, or the room that the call has by then. Entering it raises if there is no place.

        Arguments:
            samples: How many samples the call generates.
            caller: Whose call it is; its priority counts.
            time_remaining: Seconds until the deadline of the call; None is no bound.

        Raises:
            DeadlineExceededError: The wait would last longer than that.
            ServerFullError: Too many wait.
        """
        return Place(self, caller, min(samples, self._max_concurrent), time_remaining)

    def enter(self, place: "Place", time_remaining: float | None) -> None:
        """Lets a call join the queue; see `queue`."""
        samples, caller = place.samples, place.caller
        if self._waiters or self.active + samples > self._max_concurrent:
            self._check_deadline(place, time_remaining)
            self._find_place(place)
        self._waiters.setdefault(caller.priority, {})[place] = None
        self.queued += samples
        self._samples_of[caller.name] = self._samples_of.get(caller.name, 0) + samples

    def now(self) -> float:
        """Returns the time on the clock."""
        return self._clock()

    def ask(self, place: "Place", tokens: int, time_remaining: float | None) -> None:
        """Has a call let in, now or later; see `Place.ask`."""
        place.tokens = tokens if self._max_tokens is None else min(tokens, self._max_tokens)
        place.is_ready = True
        self._let_in()
        if place.lost is not None:
            raise place.lost
        if not place.is_let_in:
            self._check_deadline(place, time_remaining)

    def _ahead_of(self, waiter: "Place") -> Iterator["Place"]:
        """Yields the waiters that are served before one: for a new one, all of its priority and of higher ones."""
        for priority, waiters in self._waiters.items():
            if priority >= waiter.caller.priority:
                for other in waiters:
                    if other is waiter:
                        break
                    yield other

    def _check_deadline(self, waiter: "Place", time_remaining: float | None) -> None:
        if time_remaining is None:
            return
        ahead = list(self._ahead_of(waiter))
        samples = self.active + sum(other.samples for other in ahead) + waiter.samples - self._max_concurrent
        wait = samples / self._max_concurrent
        if self._max_tokens is not None:
            tokens = self._active_tokens + sum(other.tokens for other in ahead) + waiter.tokens - self._max_tokens
            wait = max(wait, tokens / self._max_tokens)
        # Before anything is known, only what has passed already cannot be met.
        if wait > 0 and wait * self._mean_service_time(0.0) > time_remaining:
            raise DeadlineExceededError("IN_QUEUE")

    def _mean_service_time(self, unknown: float) -> float:
        """Returns the mean of the service times, in seconds, of the samples that are here; `unknown` for those not known."""
        seconds = samples = 0.0
        for caller, count in self._samples_of.items():
            known = self.service_times.of(caller)
            seconds += count * (unknown if known is None else known)
            samples += count
        return seconds / samples if samples else unknown

    def _find_place(self, waiter: "Place") -> None:
        """Makes room in the queue for a new waiter; raises `ServerFullError` if there is none."""
        excess = self.active + self.queued + waiter.samples - self._max_concurrent - self._max_queued
        if excess <= 0:
            return
        priority = waiter.caller.priority
        lower = sum(other.samples for level, waiters in self._waiters.items() if level < priority for other in waiters)
        if excess > lower:
            raise ServerFullError(self._retry_delay(waiter.samples))
        while self.active + self.queued + waiter.samples > self._max_concurrent + self._max_queued:
            lowest = self._waiters[min(self._waiters)]
            last = next(reversed(lowest))
            self._remove(last)
            if not last.has_given_up:
                last.lose(ServerFullError(self._retry_delay(last.samples)))

    def _remove(self, waiter: "Place") -> None:
        """Takes a waiter out of the queue, if it is in there."""
        waiters = self._waiters.get(waiter.caller.priority, {})
        if waiter in waiters:
            del waiters[waiter]
            self.queued -= waiter.samples
        if not waiters:
            self._waiters.pop(waiter.caller.priority, None)

    def leave(self, place: "Place", admitted_at: float | None) -> None:
        """Gives back what a call has: its room, or its place in the queue, which others may have waited for.

        `admitted_at` is when the call got its room, if the call has come to its end: how soon others gave up tells nothing of
        how long calls take.
        """
        samples, caller = place.samples, place.caller
        self._samples_of[caller.name] -= samples
        if not self._samples_of[caller.name]:
            del self._samples_of[caller.name]
        if place.is_let_in:
            self.active -= samples
            self._active_tokens -= place.tokens
        else:
            self._remove(place)
        self._let_in()
        if admitted_at is not None:
            self.service_times.add(caller.name, self._clock() - admitted_at)

    def _let_in(self) -> None:
        while self._waiters and (waiter := self._next()) and self._has_room(waiter):
            self._remove(waiter)
            self.active += waiter.samples
            self._active_tokens += waiter.tokens
            waiter.let_in()

    def _next(self) -> "Place | None":
        for priority in sorted(self._waiters, reverse=True):
            for waiter in self._waiters[priority]:
                if waiter.is_ready and not waiter.has_given_up:
                    return waiter
        return None

    def _has_room(self, waiter: "Place") -> bool:
        if not self.active:
            return True
        fits = self.active + waiter.samples <= self._max_concurrent
        return fits and (self._max_tokens is None or self._active_tokens + waiter.tokens <= self._max_tokens)

    def _retry_delay(self, samples: int) -> float:
        """Returns the seconds until there should be a place in the queue: later for each call that asks."""
        now = self._clock()
        # If context is short, fewer samples run at a time than there are slots, and so fewer end in a second.
        per_sample = self._mean_service_time(DEFAULT_SERVICE_TIME) / (self.active or self._max_concurrent)
        # No later than when all who are here now will have left.
        last = now + (self.active + self.queued) * per_sample
        self._next_place = min(max(now, self._next_place) + samples * per_sample, last)
        return self._next_place - now


class Place:
    """A call's place in the queue, and then its room in the engine, for the length of its context.

    Arguments:
        admission: Whose queue it is.
        caller: Whose call it is.
        samples: Samples that the call needs room for.
        time_remaining: Seconds until the deadline of the call; None is no bound.
    """

    __slots__ = (
        "_admission",
        "_admitted_at",
        "_time_remaining",
        "caller",
        "is_let_in",
        "is_ready",
        "lost",
        "on_let_in",
        "on_lost",
        "samples",
        "tokens",
        "turn",
    )

    def __init__(self, admission: Admission, caller: Caller, samples: int, time_remaining: float | None) -> None:
        self.caller = caller
        self.samples = samples
        self.tokens = 0
        self.is_ready = False
        """Whether the call may start as soon as there is room: its prompt has been read."""
        self.is_let_in = False
        self.lost: ServerFullError | None = None
        """Why the call has lost its place, if it has."""
        self.on_lost: Callable[[Exception], None] | None = None
        self.on_let_in: Callable[[], None] | None = None
        self.turn: asyncio.Future[None] | None = None
        """What the call waits for once it is ready, if it has to wait."""
        self._admission = admission
        self._time_remaining = time_remaining
        self._admitted_at: float | None = None

    async def __aenter__(self) -> Self:
        self.enter()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.leave(finished=kind is None)

    def enter(self) -> None:
        """Takes the place, which `leave` gives up; see `Admission.queue`."""
        self._admission.enter(self, self._time_remaining)

    def leave(self, *, finished: bool) -> None:
        """Gives up the place, or the room that the call has by now; `finished` says whether the call has come to its end."""
        self._admission.leave(self, self._admitted_at if finished else None)

    def ask(self, context_tokens: int, time_remaining: float | None, on_admitted: Callable[[], None]) -> None:
        """Has `on_admitted` called when there is room, perhaps at once.

        Raises the errors of `admitted`; for a place that is lost later, see `call_if_lost`.
        """

        def let_in() -> None:
            self._admitted_at = self._admission.now()
            on_admitted()

        self.on_let_in = let_in
        self._admission.ask(self, context_tokens, time_remaining)

    async def admitted(self, context_tokens: int, time_remaining: float | None = None) -> None:
        """Returns when there is room for the samples of the call, and for so many tokens of context.

        Raises:
            DeadlineExceededError: The wait would last longer than `time_remaining` (seconds; None is no bound).
            ServerFullError: A call of a higher priority has taken the place.
        """
        self._admission.ask(self, context_tokens, time_remaining)
        if not self.is_let_in:
            self.turn = asyncio.get_running_loop().create_future()
            await self.turn
        self._admitted_at = self._admission.now()

    def call_if_lost(self, callback: Callable[[Exception], None]) -> None:
        """Calls back with a `ServerFullError` if a call of a higher priority takes the place.

        So a call that does something else before it waits in `admitted` can end at once.
        """
        self.on_lost = callback

    @property
    def has_given_up(self) -> bool:
        """Whether the call was cancelled, and is about to leave."""
        return self.turn is not None and self.turn.cancelled()

    def let_in(self) -> None:
        """Gives the call its room."""
        self.is_let_in = True
        if self.turn is not None:
            self.turn.set_result(None)
        if self.on_let_in is not None:
            self.on_let_in()

    def lose(self, error: ServerFullError) -> None:
        """Ends the wait of the call with an error."""
        self.lost = error
        if self.turn is not None:
            self.turn.set_exception(error)
        if self.on_lost is not None:
            self.on_lost(error)
