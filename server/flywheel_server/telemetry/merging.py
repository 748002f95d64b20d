"""Adds up the metrics of several processes, by name and labels, in small steps between which the event loop serves calls."""

import asyncio
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Final

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector, CollectorRegistry
from prometheus_client.samples import Sample
from pydantic_core import from_json, to_json

from flywheel_server.telemetry.instruments import family_of
from flywheel_server.telemetry.metrics import MAX_CALLERS, OTHER_CALLERS

SAMPLES_PER_STEP: Final = 64
"""Samples that are handled in one step, at a few microseconds each."""

Report = Sequence[str]
"""All metrics of a process, as JSON: name, documentation, kind, and some samples, with their names, labels and values."""

Merge = Callable[[float, float], float]

_MERGES: Final[Mapping[str, Merge]] = {
    "flywheel_build_info": max,
    "flywheel_certificate_expiry_timestamp_seconds": min,
    "flywheel_engine_up": min,
    "flywheel_key_expiry_timestamp_seconds": min,
    "process_max_fds": min,
    "process_start_time_seconds": min,
}
"""How values are merged that are not added up, by the name of the metric."""

_COUNTERS: Final = frozenset({"counter", "histogram", "summary"})
"""The kinds of metrics that keep what a process has counted after its end."""

Labels = tuple[tuple[str, str], ...]


async def report_of(registry: CollectorRegistry) -> Report:
    """Returns all metrics of a registry."""
    report: list[str] = []
    for family in registry.collect():
        samples = ((each.name, each.labels, each.value) for each in family.samples)
        while some := list(islice(samples, SAMPLES_PER_STEP)):
            described = (family.name, family.documentation, family.type, some)
            report.append(to_json(described, inf_nan_mode="constants").decode())
            await asyncio.sleep(0)
    return report


class MergedMetrics:
    """The metrics of several processes together.

    Counters of a process that has ended stay in the sums, as they were when the process last reported them. So counters never
    fall. Its gauges no longer count.

    Arguments:
        merges: How values are merged that are not added up, by the name of the metric, in addition to the usual ones.
    """

    def __init__(self, merges: Mapping[str, Merge]) -> None:
        self._merges = {**_MERGES, **merges}
        self._latest: dict[Hashable, Report] = {}
        self._ended: list[Report] = []
        """The last reports of processes that have ended, which `_retired` does not have yet."""
        self._retired: dict[str, _Sums] = {}
        self._callers: set[str] = set()
        self._merging = asyncio.Lock()

    def update(self, process: Hashable, report: Report) -> None:
        """Takes all metrics of a process."""
        self._latest[process] = report

    def retire(self, process: Hashable) -> None:
        """Notes that the process has ended."""
        if report := self._latest.pop(process, None):
            self._ended.append(report)

    async def merged(self) -> CollectorRegistry:
        """Returns a registry with the metrics of all processes, as they were last reported."""
        async with self._merging:
            ended, self._ended = self._ended, []
            latest = list(self._latest.values())
            for report in ended:
                await self._add_report(self._retired, report, only_counters=True)
            sums: dict[str, _Sums] = {}
            for each in self._retired.values():
                self._sums(sums, each.name, each.documentation, each.kind).add(each.values())
                await asyncio.sleep(0)
            for report in latest:
                await self._add_report(sums, report)
        registry = CollectorRegistry()
        registry.register(_Merged(list(sums.values())))
        return registry

    async def _add_report(self, sums: dict[str, "_Sums"], report: Report, *, only_counters: bool = False) -> None:
        for described in report:
            name, documentation, kind, samples = from_json(described)
            if not only_counters or kind in _COUNTERS:
                # The gauges of a process are gone with it. All processes bound them in the same way, and have the same keys.
                labels_of = self._bounded if kind in _COUNTERS else _as_tuple
                bounded = ((name, labels_of(labels), value) for name, labels, value in samples)
                self._sums(sums, name, documentation, kind).add(bounded)
            await asyncio.sleep(0)

    def _sums(self, sums: dict[str, "_Sums"], name: str, documentation: str, kind: str) -> "_Sums":
        if name not in sums:
            sums[name] = _Sums(name, documentation, kind, self._merges.get(name, _plus))
        return sums[name]

    def _bounded(self, labels: dict[str, str]) -> Labels:
        """Returns the labels of a counter. Each process counts other callers, so their names are limited here once more."""
        caller = labels.get("caller")
        if caller not in {None, OTHER_CALLERS} and caller not in self._callers:
            if len(self._callers) < MAX_CALLERS:
                self._callers.add(caller)
            else:
                labels = {**labels, "caller": OTHER_CALLERS}
        return _as_tuple(labels)


class _Sums:
    """The sums of one metric over processes."""

    def __init__(self, name: str, documentation: str, kind: str, merge: Merge) -> None:
        self.name = name
        self.documentation = documentation
        self.kind = kind
        self._merge = merge
        self._values: dict[tuple[str, Labels], float] = {}

    def add(self, samples: Iterable[tuple[str, Labels, float]]) -> None:
        """Adds the samples of one process, each with its name, labels and value."""
        for name, labels, value in samples:
            key = (name, labels)
            # A sample `_created` says when a process began to count.
            merge = min if name.endswith("_created") else self._merge
            self._values[key] = merge(self._values[key], value) if key in self._values else value

    def values(self) -> Iterator[tuple[str, Labels, float]]:
        """Yields the name, labels and value of each merged sample."""
        for (name, labels), value in self._values.items():
            yield name, labels, value

    def samples(self) -> Iterator[Sample]:
        """Yields the merged samples."""
        for name, labels, value in self.values():
            yield Sample(name, dict(labels), value)


class _Merged(Collector):
    def __init__(self, sums: Sequence[_Sums]) -> None:
        self._sums = sums

    def collect(self) -> Iterator[Metric]:
        for each in self._sums:
            yield family_of(each.name, each.documentation, each.kind, each.samples)


def _as_tuple(labels: dict[str, str]) -> Labels:
    return tuple(labels.items())


def _plus(one: float, other: float) -> float:
    return one + other
