"""Measures how late the event loop is: everything that the server does waits so long, too."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from prometheus_client.registry import CollectorRegistry

from flywheel_server.telemetry.instruments import Histogram

INTERVAL: Final = 0.1
"""Seconds between two measurements."""

BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
"""Upper bounds of the buckets, in seconds. Timers of uvloop are up to 1 ms late even if it has nothing else to do."""


@asynccontextmanager
async def measured(registry: CollectorRegistry) -> AsyncIterator[None]:
    """Measures the lag of the running event loop for the length of the context. The registry gets a histogram of it."""
    histogram = Histogram("flywheel_event_loop_lag_seconds", "How late the event loop runs what is due.", BUCKETS)
    registry.register(histogram)
    measuring = asyncio.create_task(_measure(histogram))
    try:
        yield
    finally:
        measuring.cancel()
        await asyncio.wait({measuring})


async def _measure(histogram: Histogram) -> None:
    while True:
        due = time.perf_counter() + INTERVAL
        await asyncio.sleep(INTERVAL)
        histogram.observe(max(time.perf_counter() - due, 0))
