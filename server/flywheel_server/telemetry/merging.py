"""Adds up the metrics of several processes, by name and labels."""

import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any, Final

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector, CollectorRegistry
from pydantic_core import from_json, to_json

MAX_CALLERS: Final = 100
"""Names of callers that the sums keep apart. Further names are added up as `OTHER`."""

OTHER: Final = "_other"

Merge = Callable[[float, float], float]

_MERGES: Final[Mapping[str, Merge]] = {
    "flywheel_build_info": max,
    "flywheel_engine_up": min,
    "process_max_fds": min,
    "process_start_time_seconds": min,
}
"""How values are merged that are not added up, by the name of the metric."""

_COUNTERS: Final = frozenset({"counter", "histogram", "summary"})
"""The kinds of metrics that keep what a process has counted after its end."""

Labels = tuple[tuple[str, str], ...]


def dump(registry: CollectorRegistry) -> str:
    """Returns all metrics of a registry as JSON, for `MergedMetrics.update`."""
    families = [
        (family.name, family.documentation, family.type, [(each.name, each.labels, each.value) for each in family.samples])
        for family in registry.collect()
    ]
    return to_json(families, inf_nan_mode="constants").decode()


class _Sums:
    """The sums of one metric over processes."""

    def __init__(self, name: str, documentation: str, kind: str, merge: Merge) -> None:
        self.name = name
        self.documentation = documentation
        self.kind = kind
        self._merge = merge
        self._values: dict[tuple[str, Labels], float] = {}

    def add(self, name: str, labels: Labels, value: float) -> None:
        """Adds a sample of one process."""
        key = (name, labels)
        # When a process began to count, in some versions of the format.
        merge = min if name.endswith("_created") else self._merge
        self._values[key] = merge(self._values[key], value) if key in self._values else value

    def samples(self) -> Iterator[tuple[str, Labels, float]]:
        """Yields the merged samples."""
        for (name, labels), value in self._values.items():
            yield name, labels, value

    def metric(self) -> Metric:
        """Returns the metric as prometheus_client writes it."""
        metric = Metric(self.name, self.documentation, self.kind)
        for name, labels, value in self.samples():
            metric.add_sample(name, dict(labels), value)
        return metric


class MergedMetrics(Collector):
    """The metrics of several processes together.

    Counters of a process that has ended stay in the sums, as they were when the process last reported them. So counters never
    fall. Its gauges no longer count.

    Arguments:
        merges: How values are merged that are not added up, by the name of the metric, in addition to the usual ones.
    """

    def __init__(self, merges: Mapping[str, Merge]) -> None:
        self._merges = {**_MERGES, **merges}
        self._latest: dict[Hashable, str] = {}
        self._ended: list[str] = []
        """The last reports of processes that have ended, which `_retired` does not have yet."""
        self._changing = threading.Lock()
        """Guards the reports, for moments only, because the event loop takes it too."""
        self._retired: dict[str, _Sums] = {}
        self._callers: set[str] = set()
        self._collecting = threading.Lock()

    def update(self, process: Hashable, report: str) -> None:
        """Takes all metrics of a process, as `dump` returns them."""
        with self._changing:
            self._latest[process] = report

    def retire(self, process: Hashable) -> None:
        """Notes that the process has ended."""
        with self._changing:
            if report := self._latest.pop(process, None):
                self._ended.append(report)

    def collect(self) -> Iterator[Metric]:
        """Yields the metrics of all processes."""
        with self._collecting:
            with self._changing:
                ended, self._ended = self._ended, []
                latest = list(self._latest.values())
            for report in ended:
                self._add_report(self._retired, report, only_counters=True)
            sums: dict[str, _Sums] = {}
            for each in self._retired.values():
                self._add(sums, each.name, each.documentation, each.kind, each.samples())
            for report in latest:
                self._add_report(sums, report)
        yield from (each.metric() for each in sums.values())

    def _add_report(self, sums: dict[str, _Sums], report: str, *, only_counters: bool = False) -> None:
        for name, documentation, kind, samples in from_json(report):
            if only_counters and kind not in _COUNTERS:
                continue
            self._add(
                sums, name, documentation, kind, ((name, self._bounded(labels), value) for name, labels, value in samples)
            )

    def _add(
        self, sums: dict[str, _Sums], name: str, documentation: str, kind: str, samples: Iterable[tuple[str, Labels, float]]
    ) -> None:
        if name not in sums:
            sums[name] = _Sums(name, documentation, kind, self._merges.get(name, _plus))
        for sample in samples:
            sums[name].add(*sample)

    def _bounded(self, labels: dict[str, Any]) -> Labels:
        """Returns the labels. Each process knows other callers, so their names are limited here once more."""
        caller = labels.get("caller")
        if caller is not None and caller not in self._callers:
            if len(self._callers) < MAX_CALLERS:
                self._callers.add(caller)
            else:
                labels = {**labels, "caller": OTHER}
        return tuple(labels.items())


def _plus(one: float, other: float) -> float:
    return one + other
