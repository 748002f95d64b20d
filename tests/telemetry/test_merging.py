"""Metrics of several processes are added up, and what was counted stays counted."""

from collections.abc import Mapping

from flywheel_server.telemetry.instruments import Counter, Histogram
from flywheel_server.telemetry.merging import MergedMetrics, report_of
from flywheel_server.telemetry.metrics import MAX_CALLERS, OTHER_CALLERS
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector, CollectorRegistry


class Process(Collector):
    """The metrics of a process: a counter, a histogram, and gauges."""

    def __init__(self, **gauges: float) -> None:
        self.gauges = gauges
        self.calls = Counter("calls", "Calls.", ("caller",))
        self.waits = Histogram("waits", "Waits.", (1.0, 2.0))
        self.registry = CollectorRegistry()
        for collector in (self, self.calls, self.waits):
            self.registry.register(collector)

    def collect(self) -> list[Metric]:
        return [GaugeMetricFamily(name, name, value) for name, value in self.gauges.items()]


async def values_of(merged: MergedMetrics) -> dict[tuple[str, str], float]:
    """Returns the merged values, by name and the values of the labels."""
    families = list((await merged.merged()).collect())
    return {(each.name, ",".join(each.labels.values())): each.value for family in families for each in family.samples}


async def update(merged: MergedMetrics, **processes: Process) -> None:
    for name, process in processes.items():
        merged.update(name, await report_of(process.registry))


async def test_values_are_added_up_by_name_and_labels() -> None:
    merged = MergedMetrics({"shared": max})
    one, two = Process(busy=1, shared=3, flywheel_engine_up=1), Process(busy=2, shared=4, flywheel_engine_up=0)
    one.calls.add(1, ("a",))
    one.calls.add(2, ("b",))
    two.calls.add(4, ("b",))
    one.waits.observe(0.5)
    two.waits.observe(1.5)
    await update(merged, one=one, two=two)
    values = await values_of(merged)
    assert values == {
        ("busy", ""): 3,
        ("shared", ""): 4,
        ("flywheel_engine_up", ""): 0,
        ("calls_total", "a"): 1,
        ("calls_total", "b"): 6,
        ("waits_bucket", "1.0"): 1,
        ("waits_bucket", "2.0"): 2,
        ("waits_bucket", "+Inf"): 2,
        ("waits_count", ""): 2,
        ("waits_sum", ""): 2,
    }


async def test_what_an_ended_process_had_counted_stays_and_its_gauges_go() -> None:
    merged = MergedMetrics({})
    one, two = Process(busy=1), Process(busy=2)
    for process in (one, two):
        process.calls.add(5, ("a",))
        process.waits.observe(0.5)
    await update(merged, one=one, two=two)
    merged.retire("one")
    merged.retire("unknown")
    for _ in range(2):
        values = await values_of(merged)
        assert (values["calls_total", "a"], values["waits_count", ""], values["busy", ""]) == (10, 2, 2)
    one = Process(busy=1)
    one.calls.add(1, ("a",))
    await update(merged, one=one)
    assert (await values_of(merged))["calls_total", "a"] == 11


async def test_callers_stay_few_and_keep_their_labels_however_many_processes_come_and_go() -> None:
    merged = MergedMetrics({})
    total, last = 0, dict[tuple[str, str], float]()
    for number in range(3):
        process = Process()
        for caller in range(80):
            process.calls.add(1, (f"{number} {caller}",))
            total += 1
        await update(merged, process=process)
        values = await values_of(merged)
        assert _callers(values) <= MAX_CALLERS + 1
        assert sum(value for (name, _), value in values.items() if name == "calls_total") == total
        assert all(values[key] >= value for key, value in last.items())
        last = values
        merged.retire("process")


async def test_keys_that_expire_take_no_series_from_callers_who_call() -> None:
    merged = MergedMetrics({})
    process = Process()
    expiry = GaugeMetricFamily("flywheel_key_expiry_timestamp_seconds", "Expiry.", labels=["caller"])
    for number in range(MAX_CALLERS):
        expiry.add_metric([f"idle {number}"], 5)
        process.calls.add(1, (f"busy {number}",))
    process.collect = lambda: [expiry]  # type: ignore[method-assign]
    await update(merged, one=process, two=process)
    values = await values_of(merged)
    assert _callers(values) == MAX_CALLERS
    assert ("calls_total", OTHER_CALLERS) not in values
    assert sum(name == expiry.name for name, _ in values) == MAX_CALLERS


def _callers(values: Mapping[tuple[str, str], float]) -> int:
    return sum(name == "calls_total" for name, _ in values)
