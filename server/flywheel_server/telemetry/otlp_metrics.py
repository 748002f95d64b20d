"""Sends the metrics of prometheus_client to an OTLP receiver.

If the OpenTelemetry semantic conventions have a name for a metric, it is used. All other names lose only the suffixes that a
receiver adds again when it writes them for Prometheus: `_total`, and `_seconds` and `_bytes`, which become the unit.
"""

import asyncio
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from math import inf
from typing import Any, Final

import structlog
from flywheel_proto import __version__
from opentelemetry.sdk.environment_variables import OTEL_METRIC_EXPORT_INTERVAL
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    Histogram,
    HistogramDataPoint,
    Metric,
    MetricExporter,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from prometheus_client import Metric as Family
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

log = structlog.stdlib.get_logger(__name__)

DEFAULT_INTERVAL_MILLISECONDS: Final = 60_000.0
"""Milliseconds from one export to the next, unless `OTEL_METRIC_EXPORT_INTERVAL` says otherwise."""

REFRESH_TIMEOUT: Final = 5.0
"""Seconds that the event loop may take to refresh the figures. After that, the last ones are exported."""

SCOPE: Final = InstrumentationScope("flywheel_server", __version__)

_CONVENTION_PREFIXES: Final = ("rpc_", "gen_ai_")
_CONVENTION_WORDS: Final = {
    "gen.ai": "gen_ai",
    "status.code": "status_code",
    "time.to.first.token": "time_to_first_token",
    "time.per.output.token": "time_per_output_token",
}
"""The words of the semantic conventions that have an underscore, by what is left of them with a period in its place."""

Labels = tuple[tuple[str, str], ...]


class OtlpMetrics:
    """Exports the metrics of a collector at an interval, in a thread of its own.

    Arguments:
        collector: The metrics. It is read in that thread.
        exporter: Sends them.
        resource: What names this process to the receiver.
        refresh: Runs on the event loop before each export, if it is given.
    """

    def __init__(
        self,
        collector: Collector,
        exporter: MetricExporter,
        resource: Resource,
        refresh: Callable[[], Coroutine[Any, Any, None]] | None = None,
    ) -> None:
        self._collector = collector
        self._exporter = exporter
        self._resource = resource
        self._refresh = refresh
        self._loop = asyncio.get_running_loop()
        self._began_ns = time.time_ns()
        self._stopping = threading.Event()
        self._given_up = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(_interval(),), name="flywheel-otlp-metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Exports the metrics a last time, and returns when the receiver has them, or the exporter has given up."""
        self._stopping.set()
        self._thread.join()
        self._exporter.shutdown()

    def give_up(self) -> None:
        """Ends the wait for the receiver. There is no further export: the event loop may close, and could not refresh."""
        self._given_up.set()
        self._exporter.shutdown()

    def _run(self, interval: float) -> None:
        while not self._stopping.wait(interval):
            self._export()
        if not self._given_up.is_set():
            self._export()

    def _export(self) -> None:
        try:
            if self._refresh is not None:
                with suppress(TimeoutError, CancelledError):  # it is cancelled if the event loop closes
                    asyncio.run_coroutine_threadsafe(self._refresh(), self._loop).result(REFRESH_TIMEOUT)
            self._exporter.export(data_of(self._collector.collect(), self._resource, self._began_ns, time.time_ns()))
        except Exception:
            # The next export has all that this one would have had.
            log.exception("metrics not exported")


def _interval() -> float:
    """Returns the seconds from one export to the next."""
    text = os.environ.get(OTEL_METRIC_EXPORT_INTERVAL, "").strip()
    try:
        milliseconds = float(text) if text else DEFAULT_INTERVAL_MILLISECONDS
    except ValueError:
        milliseconds = 0.0
    if not 0 < milliseconds < inf:
        log.warning("setting ignored", variable=OTEL_METRIC_EXPORT_INTERVAL, value=text)
        milliseconds = DEFAULT_INTERVAL_MILLISECONDS
    return min(milliseconds / 1000, threading.TIMEOUT_MAX)


def data_of(families: Iterable[Family], resource: Resource, began_ns: int, now_ns: int) -> MetricsData:
    """Returns the metrics as the exporter takes them. All are cumulative since `began_ns`, in nanoseconds since the epoch."""
    metrics = [metric for family in families if (metric := _metric(family, began_ns, now_ns)) is not None]
    return MetricsData([ResourceMetrics(resource, [ScopeMetrics(SCOPE, metrics, "")], "")])


def _metric(family: Family, began_ns: int, now_ns: int) -> Metric | None:
    """Returns a family of prometheus_client as a metric.

    Returns None if the family has no samples, because a metric without data points says nothing, or if it is of a kind that the
    metrics of this server do not have.
    """
    data: Sum | Gauge | Histogram
    cumulative = AggregationTemporality.CUMULATIVE
    match family.type:
        case "counter":
            samples = [sample for sample in family.samples if sample.name.endswith("_total")]
            data = Sum(_numbers(samples, began_ns, now_ns), cumulative, is_monotonic=True)
        case "gauge" | "info":
            data = Gauge(_numbers(family.samples, began_ns, now_ns))
        case "histogram":
            data = Histogram(_histograms(family.samples, began_ns, now_ns), cumulative)
        case _:
            return None
    if not data.data_points:
        return None
    name, unit = _name_and_unit(family.name)
    return Metric(name, family.documentation, unit, data)


def _name_and_unit(name: str) -> tuple[str, str]:
    unit = ""
    for suffix, symbol in (("_seconds", "s"), ("_bytes", "By")):
        if name.endswith(suffix):
            name, unit = name.removesuffix(suffix), symbol
    return _by_convention(name), unit


def _by_convention(name: str) -> str:
    """Returns the name of a metric or label as the semantic conventions write it, with periods, if it is one of theirs."""
    if name == "error_type":
        return "error.type"
    if not name.startswith(_CONVENTION_PREFIXES):
        return name
    name = name.replace("_", ".")
    for written, convention in _CONVENTION_WORDS.items():
        name = name.replace(written, convention)
    return name


def _attributes(labels: Iterable[tuple[str, str]]) -> dict[str, str]:
    # An empty label is one that is absent, by the rules of Prometheus.
    return {_by_convention(name): value for name, value in labels if value}


def _numbers(samples: Sequence[Sample], began_ns: int, now_ns: int) -> list[NumberDataPoint]:
    return [NumberDataPoint(_attributes(sample.labels.items()), began_ns, now_ns, float(sample.value)) for sample in samples]


def _histograms(samples: Sequence[Sample], began_ns: int, now_ns: int) -> list[HistogramDataPoint]:
    buckets: defaultdict[Labels, list[tuple[float, int]]] = defaultdict(list)
    sums: dict[Labels, float] = {}
    for sample in samples:
        labels = tuple(sorted((name, value) for name, value in sample.labels.items() if name != "le"))
        if sample.name.endswith("_bucket"):
            buckets[labels].append((float(sample.labels["le"]), int(sample.value)))
        elif sample.name.endswith("_sum"):
            sums[labels] = sample.value
    return [_histogram(labels, found, sums.get(labels, 0.0), began_ns, now_ns) for labels, found in buckets.items()]


def _histogram(
    labels: Labels, buckets: list[tuple[float, int]], total: float, began_ns: int, now_ns: int
) -> HistogramDataPoint:
    bounds, up_to = zip(*sorted(buckets), strict=True)
    counts = [count - before for count, before in zip(up_to, (0, *up_to), strict=False)]
    unknown: Any = None  # prometheus_client knows neither minimum nor maximum, and OTLP does not need them
    return HistogramDataPoint(
        _attributes(labels),
        began_ns,
        now_ns,
        count=up_to[-1],
        sum=total,
        bucket_counts=counts,
        explicit_bounds=[bound for bound in bounds if bound != inf],
        min=unknown,
        max=unknown,
    )
