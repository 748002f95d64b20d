"""What happened between two scrapes: counters as rates, and quantiles from the buckets of histograms."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from flywheel_client._top.exposition import COUNTERS, Labels, Samples, added, by_label


@dataclass(frozen=True)
class Quantile:
    """A quantile of a histogram of durations."""

    seconds: float
    is_above: bool
    """Whether the quantile is above the largest bound of the histogram. Then `seconds` is that bound."""


@dataclass(frozen=True)
class Interval:
    """What is known of one or several servers after a scrape.

    Attributes:
        seconds: The time since the scrape before.
        latest: The samples of the scrape.
        rates: How much each counter rose per second; empty after the first scrape.
    """

    seconds: float
    latest: Samples
    rates: Samples

    def quantile(self, histogram: str, share: float) -> Quantile | None:
        """Returns a quantile of what was observed in the interval; None if nothing was.

        Interpolates linearly in a bucket, as Prometheus' `histogram_quantile` does.
        """
        bounds = ((_bound(text), rate) for text, rate in by_label(self.rates, f"{histogram}_bucket", "le").items())
        buckets = sorted((bound, rate) for bound, rate in bounds if bound is not None)
        if not buckets or buckets[-1][1] <= 0:
            return None
        rank, lower, below = share * buckets[-1][1], 0.0, 0.0
        for upper, within in buckets:
            if within >= rank:
                if upper == float("inf"):
                    return Quantile(lower, is_above=True)
                return Quantile(lower + (upper - lower) * (rank - below) / ((within - below) or 1.0), is_above=False)
            lower, below = upper, within
        return None


def interval(before: Samples, after: Samples, seconds: float) -> Interval | None:
    """Returns what happened between two scrapes of a server; None if the server restarted, so that its counters fell."""
    if has_restarted(before, after):
        return None
    rates: dict[str, dict[Labels, float]] = {}
    for name in COUNTERS & after.keys():
        earlier = before.get(name, {})
        for labels, value in after[name].items():
            increase = value - earlier.get(labels, 0.0)  # A counter that did not exist had nothing to count.
            rates.setdefault(name, {})[labels] = max(increase, 0.0) / seconds
    return Interval(seconds, after, rates)


def has_restarted(before: Samples, after: Samples) -> bool:
    """Returns whether a counter fell or is gone. Leaves out counters of processes: a worker that ends may lower their sum."""
    names = {name for name in COUNTERS & before.keys() if not name.startswith("process_")}
    return any(after.get(name, {}).get(labels, -1.0) < value for name in names for labels, value in before[name].items())


def together(intervals: Iterable[Interval]) -> Interval:
    """Returns the sums of the intervals of several servers."""
    several = list(intervals)
    return Interval(
        max((each.seconds for each in several), default=0.0),
        added(each.latest for each in several),
        added(each.rates for each in several),
    )


def _bound(text: str) -> float | None:
    try:
        bound = float(text)
    except ValueError:
        return None
    return None if math.isnan(bound) else bound
