"""Sends the calls of a run: so many at a time (closed loop), or at a rate that does not depend on the answers (open loop).

In an open loop, a slow server does not slow down the load. Each latency counts from the time when the call was due to be sent,
even if the bench could send the call only later. So slow answers cannot hide ("coordinated omission").
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from flywheel_client._bench.calls import Caller, CallProgress, RecordingCaller, clock
from flywheel_client._bench.measurements import UNFINISHED, Measurements
from flywheel_client._bench.overhead import Overhead, OverheadMeter
from flywheel_client._bench.schedule import Arrivals, arrival_times

PROGRESS_INTERVAL_SECONDS: Final = 0.2

UNFINISHED_MESSAGE: Final = "the run was over before the call"
NOT_SENT: Final = ("CANCELLED", "NOT_SENT")
NOT_SENT_MESSAGE: Final = "the call was due, but too many calls were in flight (--max-in-flight)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The load of a run, and its limits. Exactly one of `concurrency` and `rate` is not None."""

    concurrency: int | None
    """The calls at a time of a closed loop."""
    rate: float | None
    """The calls per second of an open loop."""
    arrivals: Arrivals
    requests: int
    """The most calls of the run."""
    duration: float | None
    """The seconds after which no further call begins."""
    max_in_flight: int
    """The most calls at a time of an open loop. Further calls wait, and their latency counts the wait."""
    max_errors: int | None
    """The failed calls after which no further call begins."""
    drain_timeout: float
    """The seconds after the last beginning of a call in which the calls may end."""


@dataclass(slots=True)
class Outcome:
    """What a run has measured."""

    measurements: Measurements = field(default_factory=Measurements)
    overhead: Overhead = field(default_factory=Overhead)
    seconds: float = 0.0
    """How long the run took."""
    calls_waited: int = 0
    """The calls of an open loop that were sent late, because of `Plan.max_in_flight`."""
    unfinished: int = 0
    """The calls that had not ended when the run was over. They count as failed, unless the run was interrupted."""
    oldest_unfinished: float = 0.0
    """The longest time, in seconds, that an unfinished call had taken when the run was over."""
    interrupted: bool = False
    reached_max_errors: bool = False


class Driver:
    """Makes the calls of one run.

    Args:
        caller: Makes the calls.
        plan: The load and its limits.
        show: Is told a few times a second how many seconds have passed, and how many calls are in flight.
    """

    def __init__(self, caller: Caller, plan: Plan, show: Callable[[float, int, Measurements], None]) -> None:
        self.outcome = Outcome()
        self._caller = caller
        self._plan = plan
        self._show = show
        self._recorder: RecordingCaller = caller.recording(self.outcome.measurements, clock())
        self._tasks: set[asyncio.Task[None]] = set()
        self._slots = asyncio.Semaphore(plan.max_in_flight)
        self._begun_calls = 0
        self._stopped = False
        self._limit: asyncio.Timeout | None = None
        self._sender: asyncio.Task[None] | None = None

    async def run(self) -> Outcome:
        """Makes the calls, and returns what was measured. If the task is cancelled, the run ends early."""
        showing = asyncio.create_task(self._keep_showing())
        async with OverheadMeter() as meter:
            self._recorder.begun = clock()
            try:
                async with asyncio.timeout_at(self._end_of_drain()) as self._limit:
                    await self._make_calls()
            except TimeoutError:
                pass
            except asyncio.CancelledError:
                self.outcome.interrupted = True
                if (task := asyncio.current_task()) is not None:
                    task.uncancel()
            now = clock()
            ended = await self._cancel_tasks()
            showing.cancel()
        self._record_unfinished(now)
        self.outcome.overhead = meter.overhead
        self.outcome.seconds = now - self._recorder.begun
        for error in ended:
            if isinstance(error, Exception) and not isinstance(error, asyncio.CancelledError):
                raise error
        return self.outcome

    async def _make_calls(self) -> None:
        if self._plan.concurrency is None:
            self._sender = self._start(self._send_at_rate())
            await asyncio.wait({self._sender})
        else:
            for _ in range(min(self._plan.concurrency, self._plan.requests)):
                self._start(self._call_repeatedly())
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _call_repeatedly(self) -> None:
        """Makes one call after another, as one of the callers of a closed loop."""
        while not self._is_over(clock() - self._recorder.begun):
            self._begun_calls += 1
            await self._call(clock())

    async def _send_at_rate(self) -> None:
        """Begins the calls of an open loop, each when it is due."""
        arrivals = arrival_times(self._plan.rate or 1.0, self._plan.arrivals)
        due = 0.0
        try:
            for due in arrivals:
                if self._is_over(due):
                    return
                await asyncio.sleep(max(self._recorder.begun + due - clock(), 0))
                self.outcome.calls_waited += self._slots.locked()
                await self._slots.acquire()
                self._begun_calls += 1
                self._start(self._call_in_slot(self._recorder.begun + due))
        except asyncio.CancelledError:
            self._record_not_sent(due, arrivals)
            raise

    async def _call_in_slot(self, due: float) -> None:
        try:
            await self._call(due)
        finally:
            self._slots.release()

    async def _call(self, due: float) -> None:
        if not await self._recorder.call(due):
            limit = self._plan.max_errors
            if limit is not None and self.outcome.measurements.failed >= limit and not self._stopped:
                self._stop()

    def _stop(self) -> None:
        """Lets no further call begin, because too many calls have failed."""
        self.outcome.reached_max_errors = True
        self._stopped = True
        if self._sender is not None:
            self._sender.cancel()
        if self._limit is not None:
            self._limit.reschedule(asyncio.get_running_loop().time() + self._plan.drain_timeout)

    def _is_over(self, seconds: float) -> bool:
        """Returns whether a call that is due at so many seconds is too late, or too much."""
        duration = self._plan.duration
        return self._stopped or self._begun_calls >= self._plan.requests or (duration is not None and seconds >= duration)

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: asyncio.Task[None]) -> None:
        # A task that has failed is kept, so that the run ends with its error.
        if task.cancelled() or task.exception() is None:
            self._tasks.discard(task)

    async def _cancel_tasks(self) -> list[BaseException | None]:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    def _end_of_drain(self) -> float | None:
        """Returns the time of the event loop at which calls that have not ended are given up; None without a limit."""
        if self._plan.duration is None:
            return None
        return asyncio.get_running_loop().time() + self._plan.duration + self._plan.drain_timeout

    def _record_unfinished(self, now: float) -> None:
        for progress in self._recorder.active.values():
            self.outcome.oldest_unfinished = max(self.outcome.oldest_unfinished, now - progress.due)
            self.outcome.unfinished += 1
            self._record_given_up(UNFINISHED, UNFINISHED_MESSAGE, progress.due, progress, now)

    def _record_not_sent(self, due: float, further: Iterator[float]) -> None:
        """Records the calls that were due, but not sent: the one that is due at `due`, and the further ones until now."""
        now = clock()
        while self._recorder.begun + due <= now and not self._is_over(due):
            self._begun_calls += 1
            self._record_given_up(NOT_SENT, NOT_SENT_MESSAGE, self._recorder.begun + due, None, now)
            due = next(further)

    def _record_given_up(
        self, kind: tuple[str, str], message: str, due: float, progress: CallProgress | None, now: float
    ) -> None:
        # After an interrupt, a call may have been given up soon after it began, which says nothing about the server.
        if not self.outcome.interrupted:
            self.outcome.measurements.add_error(*kind, message, now - self._recorder.begun)
            self._recorder.give_up(due, progress, now)

    async def _keep_showing(self) -> None:
        while True:
            await asyncio.sleep(PROGRESS_INTERVAL_SECONDS)
            self._show(clock() - self._recorder.begun, len(self._recorder.active), self.outcome.measurements)


async def warm_up(caller: Caller, calls: int) -> Measurements:
    """Makes so many calls at the same time, which open the connections and fill caches. Returns what they measured."""
    measurements = Measurements()
    recorder = caller.recording(measurements, clock())
    await asyncio.gather(*(recorder.call(clock()) for _ in range(calls)))
    return measurements
