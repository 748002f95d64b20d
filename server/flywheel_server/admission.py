"""Decides which calls start, which wait in a queue, and which are refused."""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from statistics import median
from typing import Final

from flywheel_server import running_time
from flywheel_server.access.callers import Caller
from flywheel_server.errors import DeadlineExceededError, ServerFullError

DEFAULT_SERVICE_TIME: Final = 1.0
"""Seconds that a RetryInfo assumes as the service time of a caller until that is known."""

MIN_MEASURED_CALLS: Final = 8
"""Calls of a caller that must have finished before its service time is known."""

MAX_MEASURED_CALLS: Final = 64
"""Last calls of a caller whose median is its service time. A median of the last calls follows changes and ignores outliers."""

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
    waits until there is enough of both. A call that needs more than the engine has runs alone.

    Waiters are served by priority, highest first, and FIFO within a priority. A small call never overtakes a large one, but
    every call overtakes one whose prompt has not been tokenized. If the queue is full, a new call evicts waiters of lower
    priorities: the lowest priority first, and within it the newest waiter first.

    Waits are estimated by Little's law: if calls hold `max_concurrent` slots and their mean service time is S seconds, one
    slot becomes free every S / max_concurrent seconds. The same holds for tokens of context.

    Attributes:
        active: Samples (not calls) that are admitted and have not ended.
        active_tokens: Tokens of context that they hold.
        queued: Samples (not calls) that wait.
        max_concurrent: Samples that are admitted at a time: as configured, or fewer if the engine has fewer slots.
        max_queued: As given.
        max_tokens: Tokens of context that the engine has; None if there is no limit.
        service_times: How long the calls of each caller take.

    Arguments:
        max_concurrent: Samples that are generated at a time.
        max_queued: Samples that may wait, besides those for which there are free slots.
        clock: Returns monotonic seconds; by default the running time of the server.
    """

    def __init__(self, max_concurrent: int, max_queued: int, clock: Callable[[], float] = running_time.now) -> None:
        self.active = 0
        self.queued = 0
        self.service_times = ServiceTimes()
        self._max_configured = self.max_concurrent = max_concurrent
        self.max_queued = max_queued
        self.max_tokens: int | None = None
        self.active_tokens = 0
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
        self.max_concurrent = self._max_configured if slots is None else min(self._max_configured, slots)
        self.max_tokens = context_tokens
        self._admit_waiters()

    def join(self, samples: int, caller: Caller, time_remaining: float | None = None) -> "Place":
        """Adds a call to the queue, and returns its place, which is to be released when the call has ended.

        Arguments:
            samples: Slots that the call takes, mostly one for each sample.
            caller: The caller, whose priority counts.
            time_remaining: Seconds until the deadline of the call; None if it has none.

        Raises:
            DeadlineExceededError: The wait would last longer than `time_remaining`.
            ServerFullError: The queue is full.
        """
        place = Place(self, caller, min(samples, self.max_concurrent))
        if self._waiters or self.active + place.samples > self.max_concurrent:
            self._check_deadline(place, time_remaining)
            self._make_room_for(place)
        self._waiters.setdefault(caller.priority, {})[place] = None
        self.queued += place.samples
        self._samples_of[caller.name] = self._samples_of.get(caller.name, 0) + place.samples
        return place

    def request(self, place: "Place", tokens: int, time_remaining: float | None) -> None:
        """Admits a call, now or later; see `Place.request`."""
        place.tokens = tokens if self.max_tokens is None else min(tokens, self.max_tokens)
        place.is_ready = True
        self._admit_waiters()
        if place.eviction is not None:
            raise place.eviction
        if place.admitted_at is None:
            self._check_deadline(place, time_remaining)

    def release(self, place: "Place", *, finished: bool) -> None:
        """Releases what a call holds, and admits waiters that now fit; see `Place.release`."""
        caller = place.caller.name
        self._samples_of[caller] -= place.samples
        if not self._samples_of[caller]:
            del self._samples_of[caller]
        if place.admitted_at is None:
            self._remove(place)
        else:
            self.active -= place.samples
            self.active_tokens -= place.tokens
        self._admit_waiters()
        if finished and place.admitted_at is not None:
            self.service_times.add(caller, self._clock() - place.admitted_at)

    def _admit_waiters(self) -> None:
        while (waiter := self._next()) and self._fits(waiter):
            self._remove(waiter)
            self.active += waiter.samples
            self.active_tokens += waiter.tokens
            waiter.admit(self._clock())

    def _next(self) -> "Place | None":
        for priority in sorted(self._waiters, reverse=True):
            for waiter in self._waiters[priority]:
                if waiter.is_ready and not waiter.is_cancelled:
                    return waiter
        return None

    def _fits(self, waiter: "Place") -> bool:
        if not self.active:
            return True
        enough_slots = self.active + waiter.samples <= self.max_concurrent
        return enough_slots and (self.max_tokens is None or self.active_tokens + waiter.tokens <= self.max_tokens)

    def _remove(self, waiter: "Place") -> None:
        """Removes a waiter from the queue, if it is in there."""
        waiters = self._waiters.get(waiter.caller.priority, {})
        if waiter in waiters:
            del waiters[waiter]
            self.queued -= waiter.samples
        if not waiters:
            self._waiters.pop(waiter.caller.priority, None)

    def _make_room_for(self, newcomer: "Place") -> None:
        """Evicts waiters of lower priorities if the queue is full. Raises `ServerFullError` if that would not be enough."""
        excess = self.active + self.queued + newcomer.samples - self.max_concurrent - self.max_queued
        if excess <= 0:
            return
        lower = (waiters for priority, waiters in self._waiters.items() if priority < newcomer.caller.priority)
        if excess > sum(waiter.samples for waiters in lower for waiter in waiters):
            raise ServerFullError(self._retry_delay(newcomer.samples))
        while excess > 0:
            newest = next(reversed(self._waiters[min(self._waiters)]))
            self._remove(newest)
            excess -= newest.samples
            if not newest.is_cancelled:
                newest.evict(ServerFullError(self._retry_delay(newest.samples)))

    def _check_deadline(self, waiter: "Place", time_remaining: float | None) -> None:
        """Raises `DeadlineExceededError` if the call would wait longer than `time_remaining` seconds (None: no deadline)."""
        if time_remaining is None:
            return
        ahead = list(self._ahead_of(waiter))
        missing_slots = self.active + sum(other.samples for other in ahead) + waiter.samples - self.max_concurrent
        service_times = missing_slots / self.max_concurrent
        if self.max_tokens is not None:
            missing_tokens = self.active_tokens + sum(other.tokens for other in ahead) + waiter.tokens - self.max_tokens
            service_times = max(service_times, missing_tokens / self.max_tokens)
        # An unknown service time counts as 0, so that no call is refused on a guess, unless its deadline has passed already.
        if service_times > 0 and service_times * self._mean_service_time(if_unknown=0.0) > time_remaining:
            raise DeadlineExceededError("IN_QUEUE")

    def _ahead_of(self, waiter: "Place") -> Iterator["Place"]:
        """Yields the waiters that are served before this one. If it has not joined yet, it will be the last of its priority."""
        for priority, waiters in self._waiters.items():
            if priority >= waiter.caller.priority:
                for other in waiters:
                    if other is waiter:
                        break
                    yield other

    def _retry_delay(self, samples: int) -> float:
        """Returns the seconds until the queue should have a place. Each refused call gets a later time than the one before."""
        now = self._clock()
        # Not `max_concurrent`: if the context is used up, fewer samples run than there are slots.
        per_sample = self._mean_service_time(if_unknown=DEFAULT_SERVICE_TIME) / (self.active or self.max_concurrent)
        all_ended_at = now + (self.active + self.queued) * per_sample
        self._next_retry_at = min(max(now, self._next_retry_at) + samples * per_sample, all_ended_at)
        return self._next_retry_at - now

    def _mean_service_time(self, *, if_unknown: float) -> float:
        """Returns the mean, in seconds, over all waiting and admitted samples of the service times of their callers."""
        total = 0.0
        for caller, samples in self._samples_of.items():
            known = self.service_times.of(caller)
            total += samples * (if_unknown if known is None else known)
        return total / sum(self._samples_of.values()) if self._samples_of else if_unknown


class Place:
    """A call's place in the queue and, once the call is admitted, its slots and tokens of context.

    Attributes:
        caller: The caller.
        samples: Slots that the call needs: mostly one for each sample, but at most as many as the engine has.
        tokens: Tokens of context that the call needs; 0 until `is_ready`.
        is_ready: Whether the prompt has been tokenized, so that the call can start as soon as it fits.
        admitted_at: When the call was admitted, on the clock of the admission; None while it waits.
        eviction: The error of the call, if a call of a higher priority has evicted it.
    """

    def __init__(self, admission: Admission, caller: Caller, samples: int) -> None:
        self.caller = caller
        self.samples = samples
        self.tokens = 0
        self.is_ready = False
        self.admitted_at: float | None = None
        self.eviction: ServerFullError | None = None
        self._admission = admission
        self._on_admitted: Callable[[], None] | None = None
        self._on_evicted: Callable[[Exception], None] | None = None
        self._wait: asyncio.Future[None] | None = None
        """Done when the call is admitted; None unless the call waits in `admitted`."""

    async def joined(self) -> None:
        """Returns at once, because the call has joined the queue; see `admission_control.Place.joined`."""

    async def admitted(self, context_tokens: int, time_remaining: float | None = None) -> None:
        """Returns when there are slots for the samples of the call and so many free tokens of context.

        Raises:
            DeadlineExceededError: The wait would last longer than `time_remaining` (seconds; None if there is no deadline).
            ServerFullError: A call of a higher priority has evicted this one from the queue.
        """
        self._admission.request(self, context_tokens, time_remaining)
        if self.admitted_at is None:
            self._wait = asyncio.get_running_loop().create_future()
            await self._wait

    def request(self, context_tokens: int, time_remaining: float | None, on_admitted: Callable[[], None]) -> None:
        """Calls `on_admitted` when the call is admitted, perhaps at once; the alternative to `admitted`.

        Raises the errors of `admitted`. A later eviction is reported to `call_if_evicted`.
        """
        self._on_admitted = on_admitted
        self._admission.request(self, context_tokens, time_remaining)

    def call_if_evicted(self, callback: Callable[[Exception], None]) -> None:
        """Calls back with a `ServerFullError` if a call of a higher priority evicts this one.

        So a call whose prompt is still being tokenized can end at once.
        """
        self._on_evicted = callback

    def release(self, *, finished: bool) -> None:
        """Frees the slots and tokens, or the place in the queue.

        `finished` says whether the call finished normally: the duration of a call that was cut short is no service time.
        """
        self._admission.release(self, finished=finished)

    @property
    def is_cancelled(self) -> bool:
        """Whether the call was cancelled while it waited, and has not released its place yet."""
        return self._wait is not None and self._wait.cancelled()

    def admit(self, now: float) -> None:
        """Ends the wait of the call: it has its slots and tokens."""
        self.admitted_at = now
        if self._wait is not None:
            self._wait.set_result(None)
        if self._on_admitted is not None:
            self._on_admitted()

    def evict(self, error: ServerFullError) -> None:
        """Ends the wait of the call with an error: its place in the queue is lost."""
        self.eviction = error
        if self._wait is not None:
            self._wait.set_exception(error)
        if self._on_evicted is not None:
            self._on_evicted(error)
