"""Limits how often something happens."""

import time
from collections.abc import Callable


class RateLimit:
    """Allows a number of things each second, and as many at once after a second without any (a token bucket).

    Arguments:
        per_second: The number.
        clock: Returns monotonic seconds.
    """

    def __init__(self, per_second: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_second = per_second
        self._clock = clock
        self._left = float(per_second)
        self._counted_at = clock()

    def take(self) -> bool:
        """Returns whether one more is allowed now, and counts it."""
        now = self._clock()
        self._left = min(self._left + (now - self._counted_at) * self._per_second, self._per_second)
        self._counted_at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True

    def give_back(self) -> None:
        """Counts one less."""
        self._left += 1
