"""Counters and histograms that are cheap to add to, as collectors for a registry of prometheus-client.

The library's own instruments take a lock for each addition, and look labels up slowly. These ones need no lock, because only
the event loop adds to them. The thread of `OtlpMetrics` reads them too, so a reading copies what may change.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import cast

from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample
from prometheus_client.utils import floatToGoString

Labels = tuple[str, ...]
"""The values of the labels, in the order of the names."""


class Counter(Collector):
    """A counter for each combination of labels.

    Arguments:
        name: The name, without `_total`.
        documentation: What it counts.
        labels: The names of the labels. A counter without labels is 0 from the beginning.
    """

    def __init__(self, name: str, documentation: str, labels: Sequence[str] = ()) -> None:
        self._name = name
        self._documentation = documentation
        self._labels = labels
        self._values: dict[Labels, int] = {} if labels else {(): 0}

    def add(self, amount: int = 1, labels: Labels = ()) -> None:
        """Adds to the counter with these labels."""
        self._values[labels] = self._values.get(labels, 0) + amount

    def collect(self) -> Iterator[Metric]:
        """Yields the values of all counters; see `Collector`."""
        yield family_of(self._name, self._documentation, "counter", self._samples)

    def _samples(self) -> Iterator[Sample]:
        for labels, value in list(self._values.items()):
            yield Sample(f"{self._name}_total", dict(zip(self._labels, labels, strict=True)), value)


class Histogram(Collector):
    """A histogram for each combination of labels.

    Arguments:
        name: The name.
        documentation: What it measures.
        buckets: The upper bounds of the buckets, in ascending order and inclusive, without infinity.
        labels: The names of the labels. A histogram without labels exists from the beginning.
    """

    def __init__(self, name: str, documentation: str, buckets: Sequence[float], labels: Sequence[str] = ()) -> None:
        self._name = name
        self._documentation = documentation
        self._buckets = buckets
        self._labels = labels
        self._bounds = [*map(floatToGoString, buckets), "+Inf"]
        self._series: dict[Labels, _Series] = {} if labels else {(): _Series(len(self._bounds))}

    def observe(self, value: float, labels: Labels = ()) -> None:
        """Adds a value to the histogram with these labels."""
        series = self._series.get(labels)
        if series is None:
            series = self._series[labels] = _Series(len(self._bounds))
        series.counts[bisect_left(self._buckets, value)] += 1
        series.sum += value

    def collect(self) -> Iterator[Metric]:
        """Yields the values of all histograms; see `Collector`."""
        yield family_of(self._name, self._documentation, "histogram", self._samples)

    def _samples(self) -> Iterator[Sample]:
        for values, series in list(self._series.items()):
            labels = dict(zip(self._labels, values, strict=True))
            # Together, because values may be added before the last of these samples is read.
            buckets, total = list(accumulate(series.counts)), series.sum
            for bound, count in zip(self._bounds, buckets, strict=True):
                yield Sample(f"{self._name}_bucket", {**labels, "le": bound}, count)
            yield Sample(f"{self._name}_count", labels, buckets[-1])
            yield Sample(f"{self._name}_sum", labels, total)


class _Series:
    """The values of one histogram: how many are in each bucket, and their sum."""

    __slots__ = ("counts", "sum")

    def __init__(self, buckets: int) -> None:
        self.counts = [0] * buckets
        self.sum = 0.0


def family_of(name: str, documentation: str, kind: str, make: Callable[[], Iterator[Sample]]) -> Metric:
    """Returns a family whose samples are made one by one while they are read, so that a reader can stop in between.

    A list of thousands of samples would take milliseconds, and make Python collect its garbage.
    """
    family = Metric(name, documentation, kind)
    family.samples = cast("list[Sample]", _Samples(make))
    return family


class _Samples:
    """Samples that are made while they are read."""

    def __init__(self, make: Callable[[], Iterator[Sample]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[Sample]:
        return self._make()
