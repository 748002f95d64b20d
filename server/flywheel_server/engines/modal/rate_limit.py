"""Limits the rate of requests to Modal."""

import asyncio


class RateLimit:
    """A token bucket: allows `per_second` requests per second in the long run, and `burst` at once after a pause."""

    def __init__(self, per_second: float, burst: int) -> None:
        self._per_second = per_second
        self._burst = burst
        self._tokens = float(burst)
        self._refilled_at = asyncio.get_running_loop().time()

    async def acquire(self) -> None:
        """Waits until a request may be made. Only one task at a time may wait."""
        self._refill()
        if self._tokens < 1:
            await asyncio.sleep((1 - self._tokens) / self._per_second)
            self._refill()
        self._tokens -= 1

    def _refill(self) -> None:
        now = asyncio.get_running_loop().time()
        self._tokens = min(self._burst, self._tokens + (now - self._refilled_at) * self._per_second)
        self._refilled_at = now
