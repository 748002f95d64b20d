"""Writes the page about a server: its build, its live figures, and its settings, as HTML that needs no JavaScript."""

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from itertools import islice
from typing import Final

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.samples import Sample

REFRESH_SECONDS: Final = 10
"""Seconds after which a browser loads the page again."""

ROWS_PER_STEP: Final = 16
"""Rows that are made in one step. A histogram, of which a row is made, may have 20 samples."""

MAX_VALUE_LENGTH: Final = 300
"""Characters of a value that are shown."""

Rows = Iterable[tuple[str, str]]
"""Names, each with a value."""

_START: Final = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="refresh" content="{REFRESH_SECONDS}">
<title>Flywheel gRPC</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em }}
table {{ border-collapse: collapse; width: 100% }}
th, td {{ border-bottom: 1px solid #8884; padding: .2em .6em .2em 0; text-align: left; vertical-align: top }}
th {{ font-weight: normal }}
td {{ font-variant-numeric: tabular-nums; overflow-wrap: anywhere }}
td + td {{ white-space: nowrap }}
thead th {{ font-weight: bold }}
</style>
</head>
<body>
<h1>Flywheel gRPC</h1>
<p>Prometheus reads the same figures at <a href="/metrics">/metrics</a>.</p>
"""
_END: Final = "</body>\n</html>\n"


async def status_page(build: Rows, settings: Mapping[str, Rows], registry: CollectorRegistry) -> str:
    """Returns the page. Lets the event loop run in between.

    Arguments:
        build: What the server is made of.
        settings: The settings of each group, without secrets.
        registry: The metrics.
    """
    gauges: list[tuple[str, ...]] = []
    counters: list[tuple[str, ...]] = []
    histograms: list[tuple[str, ...]] = []
    for family in registry.collect():
        found = _histogram_rows(family) if family.type == "histogram" else _value_rows(family)
        rows = {"histogram": histograms, "counter": counters}.get(family.type, gauges)
        while some := list(islice(found, ROWS_PER_STEP)):
            rows += some
            await asyncio.sleep(0)
    parts = [
        _START,
        _table("Build", ("", ""), build),
        _table("Now", ("Metric", "Labels", "Value"), gauges),
        _table("Since the start", ("Metric", "Labels", "Value"), counters),
        _table("Times and sizes since the start", ("Metric", "Labels", "Count", "Mean", "p50", "p99"), histograms),
        *(_table(f"Settings: {group}", ("Setting", "Value"), rows) for group, rows in settings.items()),
        _END,
    ]
    return "".join(parts)


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table with a title; nothing if there are no rows."""
    lines = [
        f'<tr><th scope="row">{_text(name)}</th>{"".join(f"<td>{_text(each)}</td>" for each in rest)}</tr>\n'
        for name, *rest in rows
    ]
    if not lines:
        return ""
    names = "".join(f'<th scope="col">{_text(each)}</th>' for each in columns)
    head = f"<thead><tr>{names}</tr></thead>\n" if any(columns) else ""
    return f"<h2>{_text(title)}</h2>\n<table>\n{head}{''.join(lines)}</table>\n"


def _text(value: str) -> str:
    return escape(value if len(value) <= MAX_VALUE_LENGTH else value[: MAX_VALUE_LENGTH - 1] + "…")


def _value_rows(family: Metric) -> Iterator[tuple[str, ...]]:
    for sample in family.samples:
        yield sample.name, _labels(sample), _number(sample.value)


def _histogram_rows(family: Metric) -> Iterator[tuple[str, ...]]:
    buckets: list[tuple[float, float]] = []
    count = 0.0
    for sample in family.samples:
        if sample.name.endswith("_bucket"):
            buckets.append((float(sample.labels["le"]), sample.value))
        elif sample.name.endswith("_count"):
            count = sample.value
        elif sample.name.endswith("_sum"):
            figures = (sample.value / count, quantile(0.5, buckets), quantile(0.99, buckets)) if count else ()
            yield family.name, _labels(sample), _number(count), *map(_number, figures)
            buckets = []


def quantile(share: float, buckets: Sequence[tuple[float, float]]) -> float:
    """Returns about which value so large a share of the values does not exceed, as Prometheus' `histogram_quantile` does.

    Arguments:
        share: From 0 to 1.
        buckets: The upper bound of each bucket in ascending order, the last one infinity, and how many values do not exceed it.
    """
    rank = share * buckets[-1][1]
    lower, below = 0.0, 0.0
    for bound, up_to in buckets[:-1]:
        if up_to >= rank and up_to > below:
            return lower + (bound - lower) * (rank - below) / (up_to - below)
        lower, below = bound, up_to
    return lower


def _labels(sample: Sample) -> str:
    return ", ".join(f"{name}={value}" for name, value in sample.labels.items() if value and name != "rpc_system_name")


def _number(value: float) -> str:
    return f"{value:.0f}" if value == int(value) else f"{value:.3g}"
