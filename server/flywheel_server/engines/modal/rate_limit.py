"""How often requests to Modal may be made."""

import asyncio


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
