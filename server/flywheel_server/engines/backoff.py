"""How long to wait before a request to Modal is repeated, and how often requests may be made at all."""

import asyncio
import random
from typing import Final

FIRST_DELAY: Final = 0.1
MAX_DELAY: Final = 2.0


class Backoff:
    """The delays between tries: exponential with jitter, from `FIRST_DELAY` to `MAX_DELAY` seconds."""

    def __init__(self) -> None:
        self._delay = FIRST_DELAY

    def reset(self) -> None:
        """Begins anew, after a try that succeeded."""
        self._delay = FIRST_DELAY

    async def wait(self) -> None:
        """Waits before the next try."""
        delay, self._delay = self._delay, min(2 * self._delay, MAX_DELAY)
        # Many gateways and containers may be refused at the same moment, and should not all come back at the same moment.
        await asyncio.sleep(delay * random.uniform(0.5, 1.0))  # noqa: S311 - nobody is to be kept from guessing it


class RateLimit:
    """A token bucket: after a pause, `burst` requests may be made at once, and `per_second` in the long run."""

    def __init__(self, per_second: float, burst: int) -> None:
        self._per_second = per_second
        self._burst = burst
        self._tokens = float(burst)
        self._counted = asyncio.get_running_loop().time()

    async def acquire(self) -> None:
        """Returns when a request may be made. One task at a time may wait."""
        self._refill()
        if self._tokens < 1:
            await asyncio.sleep((1 - self._tokens) / self._per_second)
            self._refill()
        self._tokens -= 1

    def _refill(self) -> None:
        now = asyncio.get_running_loop().time()
        self._tokens = min(self._burst, self._tokens + (now - self._counted) * self._per_second)
        self._counted = now
