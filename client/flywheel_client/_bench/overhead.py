"""Measures the bench itself, to tell whether the server or the bench was the limit."""

import asyncio
import contextlib
import time
from dataclasses import dataclass, field
from typing import Final, Self

from flywheel_client._bench.histogram import Histogram

LAG_INTERVAL_SECONDS: Final = 0.01
"""The interval of the timer whose delay is the lag of the event loop."""

MAX_LOOP_SHARE: Final = 0.8
"""Above this share of one processor, the event loop of the bench has no room to read answers as they come."""

MIN_RELEVANT_LAG_SECONDS: Final = 0.003
"""A lag that is shorter is noise of the machine."""

MAX_LAG_SHARE: Final = 0.1
"""A lag above this share of the median wait makes the percentiles of waits wrong."""

MAX_LAG_SHARE_OF_PAUSES: Final = 0.25
"""A lag above this share of the longest inter-token latencies makes these wrong."""


@dataclass(slots=True)
class Overhead:
    """What the bench itself used during the run."""

    lag: Histogram = field(default_factory=Histogram)
    """How late timers of the event loop were."""
    loop_cpu_share: float = 0.0
    """The share of one processor that the thread of the event loop used."""
    cpu_share: float = 0.0
    """The share of one processor that all threads used; it may exceed 1."""

    def limits(self, send_delay: Histogram, waits: Histogram, inter_token: Histogram, calls_waited: int) -> list[str]:
        """Returns a clause for each way in which the bench was a limit of the figures.

        Args:
            send_delay: How late the calls were sent.
            waits: How long callers waited for the first answer.
            inter_token: The inter-token latencies.
            calls_waited: The calls that were late because of the limit of calls at the same time.
        """
        found = []
        if self.loop_cpu_share > MAX_LOOP_SHARE:
            found.append(f"its event loop was busy {self.loop_cpu_share:.0%} of the time")
        typical = waits.percentile(50)
        tolerated = max(MIN_RELEVANT_LAG_SECONDS, MAX_LAG_SHARE * typical)
        pause = inter_token.percentile(99)
        if (lag := self.lag.percentile(99)) > tolerated:
            found.append(f"its event loop was {lag * 1000:.1f} ms late (p99), beside a median wait of {typical * 1000:.1f} ms")
        elif pause and lag > max(MIN_RELEVANT_LAG_SECONDS, MAX_LAG_SHARE_OF_PAUSES * pause):
            found.append(
                f"its event loop was {lag * 1000:.1f} ms late (p99), beside {pause * 1000:.1f} ms between tokens (p99)"
            )
        if not calls_waited and (delay := send_delay.percentile(99)) > tolerated:
            found.append(f"it sent calls {delay * 1000:.1f} ms late (p99)")
        return found


class OverheadMeter:
    """Measures the overhead within an `async with` block."""

    def __init__(self) -> None:
        self.overhead = Overhead()

    async def __aenter__(self) -> Self:
        self._begun = time.perf_counter(), time.thread_time(), time.process_time()
        self._ticking = asyncio.create_task(self._tick())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._ticking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._ticking
        wall, loop, process = self._begun
        elapsed = time.perf_counter() - wall
        self.overhead.loop_cpu_share = (time.thread_time() - loop) / elapsed
        self.overhead.cpu_share = (time.process_time() - process) / elapsed

    async def _tick(self) -> None:
        while True:
            due = time.perf_counter() + LAG_INTERVAL_SECONDS
            await asyncio.sleep(LAG_INTERVAL_SECONDS)
            # A timer that is very late stands for the timers that would have been due meanwhile.
            lag = time.perf_counter() - due
            for _ in range(1 + int(lag / LAG_INTERVAL_SECONDS)):
                self.overhead.lag.add(lag)
                lag -= LAG_INTERVAL_SECONDS
