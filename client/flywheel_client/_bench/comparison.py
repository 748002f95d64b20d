"""Compares the reports of two runs."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any, Final

from flywheel_client._bench.histogram import PERCENTILES
from flywheel_client._bench.report import LATENCY_TITLES, Report, Setup
from flywheel_client._bench.terminal_report import format_number, format_seconds, table

NOTEWORTHY_CHANGE: Final = 0.05
"""A smaller change is not marked. Two runs of the same server differ by some percent, too."""


def comparison_lines(before: Report, after: Report) -> Iterator[str]:
    """Yields the lines of a comparison: what differs in the setup, and each figure of both runs with its change."""
    differences = list(_differences(before.setup, after.setup))
    if differences:
        yield "The runs differ in their setup:"
        yield from table([["", "A", "B"], *differences])
        yield ""
    rows = [["", "A", "B", "change", ""]]
    rows.append(_row("calls/s", before.calls_per_second, after.calls_per_second, better=1))
    rows.append(_row("tokens/s", before.generated_tokens_per_second, after.generated_tokens_per_second, better=1))
    rows.append(_row("failed calls", before.calls_failed, after.calls_failed, better=-1))
    for name, title in LATENCY_TITLES.items():
        if name in before.latencies and name in after.latencies:
            for percent in PERCENTILES:
                figures = [report.latencies[name].percentile(percent) for report in (before, after)]
                rows.append(_row(f"{title} p{percent:g}", *figures, better=-1, seconds=True))
    yield from table(rows, align_right=True)
    kinds = {f"{error.code} {error.reason}".rstrip() for report in (before, after) for error in report.errors}
    if kinds:
        yield ""
        counts = [_error_counts(report) for report in (before, after)]
        yield from table(
            [["failed calls", "A", "B"], *([kind, *(str(each.get(kind, 0)) for each in counts)] for kind in sorted(kinds))]
        )
    for name, report in (("A", before), ("B", after)):
        if report.bench_limits:
            yield f"In run {name}, the bench was a limit: {'; '.join(report.bench_limits)}."
        if report.interrupted:
            yield f"Run {name} was interrupted."


def _error_counts(report: Report) -> Mapping[str, int]:
    return {f"{error.code} {error.reason}".rstrip(): error.count for error in report.errors}


def _differences(before: Setup, after: Setup) -> Iterator[list[str]]:
    for each in fields(Setup):
        first, second = getattr(before, each.name), getattr(after, each.name)
        if each.name == "fields":
            for name in sorted(first.keys() | second.keys()):
                yield from _difference(name, first.get(name, "unset"), second.get(name, "unset"))
        else:
            yield from _difference(each.name, first, second)


def _difference(name: str, first: Any, second: Any) -> Iterator[list[str]]:  # noqa: ANN401 - any value of an option
    if first != second:
        yield [name, str(first), str(second)]


def _row(title: str, before: float, after: float, *, better: int, seconds: bool = False) -> list[str]:
    """Returns a row of the table. `better` is 1 if a higher figure is better, else -1."""
    figures = [format_seconds(figure) if seconds else format_number(figure) for figure in (before, after)]
    if not before and not after:
        return [title, *figures, "", ""]
    change = after / before - 1 if before else math.inf
    mark = "" if abs(change) < NOTEWORTHY_CHANGE else "better" if change * better > 0 else "worse"
    return [title, *figures, f"{change:+.1%}" if before else "from 0", mark]
