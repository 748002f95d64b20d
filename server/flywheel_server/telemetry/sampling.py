"""Limits how many traces begin here each second, so that traces cost at most a small share of a core, whatever the load."""

import time
from collections.abc import Callable
from typing import Any, Final

from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, ParentBased, Sampler, SamplingResult

MAX_TRACES_PER_SECOND: Final = 100
"""How many traces begin here each second, unless `OTEL_TRACES_SAMPLER` says otherwise. A span takes about 0.2 ms of CPU."""


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


class _LimitedSampler(Sampler):
    """Samples while a limit allows it."""

    def __init__(self, limit: RateLimit) -> None:
        self._limit = limit

    def should_sample(self, *args: Any, **kwargs: Any) -> SamplingResult:  # noqa: ANN401 - as the sampler that decides
        """See `Sampler.should_sample`."""
        return (ALWAYS_ON if self._limit.take() else ALWAYS_OFF).should_sample(*args, **kwargs)

    def get_description(self) -> str:
        """See `Sampler.get_description`."""
        return "LimitedSampler"


def sampler_of(limit: RateLimit) -> Sampler:
    """Returns a sampler that obeys the caller's decision, and otherwise samples while the limit allows it."""
    return ParentBased(_LimitedSampler(limit))
