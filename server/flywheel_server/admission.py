"""Decides which calls start, which wait in a queue, and which are refused."""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from statistics import median
from typing import Final, Self

from flywheel_server import running_time
from flywheel_server.access.callers import Caller
from flywheel_server.errors import DeadlineExceededError, ServerFullError

DEFAULT_SERVICE_TIME: Final = 1.0
"""Seconds that a RetryInfo assumes as the service time of a caller, as long as it is not known."""

MIN_MEASURED_CALLS: Final = 8
"""Calls of a caller that must have finished before its service time is known."""

MAX_MEASURED_CALLS: Final = 64
"""The service time of a caller is the median of its last calls, at most so many: it follows changes, and ignores outliers."""

MAX_MEASURED_CALLERS: Final = 1024
"""Callers whose service times are kept; the least recently active are dropped first."""


class ServiceTimes:
    """Measures how long the calls of each caller take from admission to their end.

    Callers are measured separately, because one caller's calls may be much longer than another's.
    """

    def __init__(self) -> None:
        self._seconds: OrderedDict[str, deque[float]] = OrderedDict()
        self._medians: dict[str, float] = {}

    def add(self, caller: str, seconds: float) -> None:
        """Records the duration of a call of the caller."""
        times = self._seconds.get(caller)
        if times is None:
            times = self._seconds[caller] = deque(maxlen=MAX_MEASURED_CALLS)
        self._seconds.move_to_end(caller)
        times.append(seconds)
        # `of` computes the median, because few calls need it.
        self._medians.pop(caller, None)
        if len(self._seconds) > MAX_MEASURED_CALLERS:
            dropped, _ = self._seconds.popitem(last=False)
            self._medians.pop(dropped, None)

    def of(self, caller: str) -> float | None:
        """Returns the service time of the caller in seconds; None if too few calls have finished."""
        known = self._medians.get(caller)
        if known is None and len(times := self._seconds.get(caller, ())) >= MIN_MEASURED_CALLS:
            known = self._medians[caller] = median(times)
        return known


class Admission:
    """Admits as many calls as the engine can work on at a time, and queues a bounded number of others.

    The engine has two resources: slots, of which each sample needs one, and tokens of context that all samples share. A call
    waits until there is enough of both. Waiters are served by priority, highest first, and FIFO within a priority. A small call
    never overtakes a large one, but every call overtakes one whose prompt has not been tokenized. A call that needs more than
    the engine has runs alone. If the queue is full, a new call evicts the last waiter of the lowest priority, if that is lower
    than its own.

    Waits are estimated by Little's law: if calls hold `max_concurrent` slots and their mean service time is S seconds, one
    slot becomes free every S / max_concurrent seconds. The same holds for tokens of context. An unknown service time counts
    as 0 against a deadline, so that no call is refused on a guess.

    Arguments:
        max_concurrent: Samples that are generated at a time.
        max_queued: Samples that may wait, besides those for which there are free slots.
        clock: Returns monotonic seconds; by default the running time of the server.
    """

    def __init__(self, max_concurrent: int, max_queued: int, clock: Callable[[], float] = running_time.now) -> None:
        self.active = 0
        """Samples that are admitted and have not ended."""
        self.queued = 0
        """Samples that wait."""
        self.service_times = ServiceTimes()
        self._max_configured = self._max_concurrent = max_concurrent
        self._max_queued = max_queued
        self._max_tokens: int | None = None
        self._active_tokens = 0
        self._clock = clock
        self._next_retry_at = 0.0
        self._samples_of: dict[str, int] = {}
        """Samples of each caller, waiting and admitted."""
        # For each priority, an insertion-ordered set of waiters: any waiter is removed in constant time.
        self._waiters: dict[int, dict[Place, None]] = {}

    def set_capacity(self, slots: int | None, context_tokens: int | None) -> None:
        """Caps concurrency at the engine's slots and tokens of shared context, so that calls queue here, in order.

        None is no limit.
        """
        self._max_concurrent = self._max_configured if slots is None else min(self._max_configured, slots)
        self._max_tokens = context_tokens
        self._admit_waiters()

    def queue(self, samples: int, caller: Caller, time_remaining: float | None = None) -> "Place":
        """Returns a context manager: a place in the queue and, once the call is admitted, its slots and tokens.

        Leaving the context releases them. Entering it joins the queue.

        Arguments:
            samples: Samples that the call generates.
            caller: The caller, whose priority counts.
            time_remaining: Seconds until the deadline of the call; None if it has none.

        Raises (on entering):
            DeadlineExceededError: The wait would last longer than `time_remaining`.
            ServerFullError: The queue is full.
        """
        return Place(self, caller, min(samples, self._max_concurrent), time_remaining)

    def join(self, place: "Place", time_remaining: float | None) -> None:
        """Adds a call to the queue; see `queue`."""
        samples, caller = place.samples, place.caller
        if self._waiters or self.active + samples > self._max_concurrent:
            self._check_deadline(place, time_remaining)
            self._make_room_for(place)
        self._waiters.setdefault(caller.priority, {})[place] = None
        self.queued += samples
        self._samples_of[caller.name] = self._samples_of.get(caller.name, 0) + samples

    def now(self) -> float:
        """Returns the time on the clock."""
        return self._clock()

    def request(self, place: "Place", tokens: int, time_remaining: float | None) -> None:
        """Admits a call, now or later; see `Place.request`."""
        place.tokens = tokens if self._max_tokens is None else min(tokens, self._max_tokens)
        place.is_ready = True
        self._admit_waiters()
        if place.eviction is not None:
            raise place.eviction
        if not place.is_admitted:
            self._check_deadline(place, time_remaining)

    def _ahead_of(self, waiter: "Place") -> Iterator["Place"]:
        """Yields the waiters that are served before this one. A new one comes after all others of its priority."""
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
        missing_slots = self.active + sum(other.samples for other in ahead) + waiter.samples - self._max_concurrent
        wait = missing_slots / self._max_concurrent  # in service times
        if self._max_tokens is not None:
            missing_tokens = self._active_tokens + sum(other.tokens for other in ahead) + waiter.tokens - self._max_tokens
            wait = max(wait, missing_tokens / self._max_tokens)
        # If no service time is known, only a deadline that has passed already is refused.
        if wait > 0 and wait * self._mean_service_time(0.0) > time_remaining:
            raise DeadlineExceededError("IN_QUEUE")

    def _mean_service_time(self, unknown: float) -> float:
        """Returns the mean service time in seconds over all samples, waiting and admitted; `unknown` replaces unknown ones."""
        seconds = samples = 0.0
        for caller, count in self._samples_of.items():
            known = self.service_times.of(caller)
            seconds += count * (unknown if known is None else known)
            samples += count
        return seconds / samples if samples else unknown

    def _make_room_for(self, waiter: "Place") -> None:
        """Evicts waiters of lower priorities if the queue is full; raises `ServerFullError` if that is not enough."""
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
            if not last.is_cancelled:
                last.evict(ServerFullError(self._retry_delay(last.samples)))

    def _remove(self, waiter: "Place") -> None:
        """Removes a waiter from the queue, if it is in there."""
        waiters = self._waiters.get(waiter.caller.priority, {})
        if waiter in waiters:
            del waiters[waiter]
            self.queued -= waiter.samples
        if not waiters:
            self._waiters.pop(waiter.caller.priority, None)

    def release(self, place: "Place", admitted_at: float | None) -> None:
        """Frees the slots and tokens of a call, or its place in the queue, and admits waiters that now fit.

        `admitted_at` is the time of admission if the call finished normally, and None otherwise: the duration of a call that
        was cut short is no service time.
        """
        samples, caller = place.samples, place.caller
        self._samples_of[caller.name] -= samples
        if not self._samples_of[caller.name]:
            del self._samples_of[caller.name]
        if place.is_admitted:
            self.active -= samples
            self._active_tokens -= place.tokens
        else:
            self._remove(place)
        self._admit_waiters()
        if admitted_at is not None:
            self.service_times.add(caller.name, self._clock() - admitted_at)

    def _admit_waiters(self) -> None:
        while self._waiters and (waiter := self._next()) and self._fits(waiter):
            self._remove(waiter)
            self.active += waiter.samples
            self._active_tokens += waiter.tokens
            waiter.admit()

    def _next(self) -> "Place | None":
        for priority in sorted(self._waiters, reverse=True):
            for waiter in self._waiters[priority]:
                if waiter.is_ready and not waiter.is_cancelled:
                    return waiter
        return None

    def _fits(self, waiter: "Place") -> bool:
        if not self.active:
            return True
        enough_slots = self.active + waiter.samples <= self._max_concurrent
        return enough_slots and (self._max_tokens is None or self._active_tokens + waiter.tokens <= self._max_tokens)

    def _retry_delay(self, samples: int) -> float:
        """Returns the seconds until the queue should have a place; each refused call gets a later time than the last."""
        now = self._clock()
        # Not `max_concurrent`: if the context is used up, fewer samples run than there are slots.
        per_sample = self._mean_service_time(DEFAULT_SERVICE_TIME) / (self.active or self._max_concurrent)
        # By then, all present calls will have ended.
        last = now + (self.active + self.queued) * per_sample
        self._next_retry_at = min(max(now, self._next_retry_at) + samples * per_sample, last)
        return self._next_retry_at - now


class Place:
    """A call's place in the queue and, once the call is admitted, its slots and tokens of context.

    Arguments:
        admission: The admission whose queue it is.
        caller: The caller.
        samples: Slots that the call needs.
        time_remaining: Seconds until the deadline of the call; None if it has none.
    """

    __slots__ = (
        "_admission",
        "_admitted_at",
        "_on_admitted",
        "_on_evicted",
        "_time_remaining",
        "_wait",
        "caller",
        "eviction",
        "is_admitted",
        "is_ready",
        "samples",
        "tokens",
    )

    def __init__(self, admission: Admission, caller: Caller, samples: int, time_remaining: float | None) -> None:
        self.caller = caller
        self.samples = samples
        self.tokens = 0
        self.is_ready = False
        """Whether the prompt has been tokenized, so that the call can start as soon as it fits."""
        self.is_admitted = False
        self.eviction: ServerFullError | None = None
        """The error of the call, if a call of a higher priority has evicted it."""
        self._on_evicted: Callable[[Exception], None] | None = None
        self._on_admitted: Callable[[], None] | None = None
        self._wait: asyncio.Future[None] | None = None
        """Done when the call is admitted; None unless the call waits in `admitted`."""
        self._admission = admission
        self._time_remaining = time_remaining
        self._admitted_at: float | None = None

    async def __aenter__(self) -> Self:
        self.join()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.release(finished=kind is None)

    def join(self) -> None:
        """Joins the queue; see `Admission.queue`."""
        self._admission.join(self, self._time_remaining)

    def release(self, *, finished: bool) -> None:
        """Frees the place, or the slots and tokens; `finished` says whether the call finished normally."""
        self._admission.release(self, self._admitted_at if finished else None)

    def request(self, context_tokens: int, time_remaining: float | None, on_admitted: Callable[[], None]) -> None:
        """Calls `on_admitted` when the call is admitted, perhaps at once; the alternative to `admitted`.

        Raises the errors of `admitted`. A later eviction is reported to `call_if_evicted`.
        """

        def admitted() -> None:
            self._admitted_at = self._admission.now()
            on_admitted()

        self._on_admitted = admitted
        self._admission.request(self, context_tokens, time_remaining)

    async def admitted(self, context_tokens: int, time_remaining: float | None = None) -> None:
        """Returns when there are slots for the samples of the call and so many free tokens of context.

        Raises:
            DeadlineExceededError: The wait would last longer than `time_remaining` (seconds; None if there is no deadline).
            ServerFullError: A call of a higher priority has evicted this one from the queue.
        """
        self._admission.request(self, context_tokens, time_remaining)
        if not self.is_admitted:
            self._wait = asyncio.get_running_loop().create_future()
            await self._wait
        self._admitted_at = self._admission.now()

    def call_if_evicted(self, callback: Callable[[Exception], None]) -> None:
        """Calls back with a `ServerFullError` if a call of a higher priority evicts this one.

        So a call whose prompt is still being tokenized can end at once.
        """
        self._on_evicted = callback

    @property
    def is_cancelled(self) -> bool:
        """Whether the call was cancelled while it waited, and has not released its place yet."""
        return self._wait is not None and self._wait.cancelled()

    def admit(self) -> None:
        """Ends the wait of the call: it has its slots and tokens."""
        self.is_admitted = True
        if self._wait is not None:
            self._wait.set_result(None)
        if self._on_admitted is not None:
            self._on_admitted()

    def evict(self, error: ServerFullError) -> None:
        """Ends the wait of the call with an error: it has no place any longer."""
        self.eviction = error
        if self._wait is not None:
            self._wait.set_exception(error)
        if self._on_evicted is not None:
            self._on_evicted(error)
