"""Counts durations of any number in bounded memory, precise enough for percentiles."""

import math
from collections.abc import Iterable, Iterator
from typing import Any, Final

BUCKET_GROWTH: Final = 1.01
"""The ratio between the limits of a bucket. A percentile is at most half a percent wrong."""

MIN_SECONDS: Final = 1e-6
"""Shorter durations, which no clock here can tell apart, count as this long."""

PERCENTILES: Final = (50.0, 90.0, 99.0)

_LOG_GROWTH: Final = math.log(BUCKET_GROWTH)


class Histogram:
    """Counts durations in buckets whose limits grow by one percent, as an HDR histogram does. Durations are in seconds."""

    def __init__(self) -> None:
        self.count = 0
        self.total = 0.0
        self.min = math.inf
        self.max = 0.0
        self.buckets: dict[int, int] = {}
        """The number of durations in each bucket. Bucket i begins at MIN_SECONDS times BUCKET_GROWTH to the power of i."""

    def add(self, seconds: float, count: int = 1) -> None:
        """Counts a duration, or several equal ones."""
        seconds = max(seconds, MIN_SECONDS)
        bucket = int(math.log(seconds / MIN_SECONDS) / _LOG_GROWTH)
        self.buckets[bucket] = self.buckets.get(bucket, 0) + count
        self.count += count
        self.total += seconds * count
        self.min = min(self.min, seconds)
        self.max = max(self.max, seconds)

    def merge(self, other: "Histogram") -> None:
        """Counts the durations of another histogram too."""
        for bucket, count in other.buckets.items():
            self.buckets[bucket] = self.buckets.get(bucket, 0) + count
        self.count += other.count
        self.total += other.total
        self.min = min(self.min, other.min)
        self.max = max(self.max, other.max)

    @property
    def mean(self) -> float:
        """The mean in seconds; 0 without durations."""
        return self.total / self.count if self.count else 0.0

    def percentile(self, percent: float) -> float:
        """Returns the duration that so many percent of the durations do not exceed (nearest rank); 0 without durations."""
        rank = max(math.ceil(self.count * percent / 100), 1)
        seen = 0
        for bucket in sorted(self.buckets):
            seen += self.buckets[bucket]
            if seen >= rank:
                return min(max(_middle(bucket), self.min), self.max)
        return 0.0

    def rows(self, number: int) -> list[tuple[float, float, int]]:
        """Returns about that many wider buckets, from the minimum to the maximum: their limits and counts.

        The limits are evenly spaced. If the maximum is more than ten times the minimum, their ratios are even instead.
        """
        if not self.count:
            return []
        if self.max <= self.min * BUCKET_GROWTH:
            return [(self.min, self.max, self.count)]
        growth = (self.max / self.min) ** (1 / number) if self.max > 10 * self.min else None
        width = (self.max - self.min) / number
        limits = [self.min * growth**each if growth else self.min + width * each for each in range(number)] + [self.max]
        counts = [0] * number
        row = 0
        for bucket in sorted(self.buckets):
            while row < number - 1 and _middle(bucket) >= limits[row + 1]:
                row += 1
            counts[row] += self.buckets[bucket]
        return list(zip(limits, limits[1:], counts, strict=False))

    def as_json(self) -> dict[str, Any]:
        """Returns the counts and the figures that people read, in seconds."""
        figures = {f"p{percent:g}": self.percentile(percent) for percent in PERCENTILES}
        minimum = self.min if self.count else 0.0
        summary = {"count": self.count, "mean": self.mean, "min": minimum, **figures, "max": self.max}
        return summary | {"total": self.total, "buckets": [[bucket, self.buckets[bucket]] for bucket in sorted(self.buckets)]}

    @classmethod
    def from_json(cls, value: Any) -> "Histogram":  # noqa: ANN401 - anything can be in a file
        """Returns the histogram that `as_json` has described.

        Raises:
            KeyError: A part is missing.
            TypeError: A part has the wrong type.
            ValueError: A part has an impossible value.
        """
        made = cls()
        made.buckets = dict(_checked_buckets(value["buckets"]))
        made.count, made.total = sum(made.buckets.values()), float(value["total"])
        made.max = float(value["max"])
        made.min = float(value["min"]) if made.count else math.inf
        return made


def _middle(bucket: int) -> float:
    """Returns the duration in the middle of a bucket."""
    return float(MIN_SECONDS * BUCKET_GROWTH ** (bucket + 0.5))


def _checked_buckets(pairs: Iterable[Iterable[Any]]) -> Iterator[tuple[int, int]]:
    for bucket, count in pairs:
        if type(bucket) is not int or type(count) is not int or not 0 <= bucket <= _MAX_BUCKET or count < 0:
            raise ValueError("a bucket is a number and a count")
        yield bucket, count


_MAX_BUCKET: Final = 5000
"""The bucket of durations of far more than a century."""
