"""Shows a report in the terminal, in plain text."""

import textwrap
from collections.abc import Iterator, Sequence
from typing import Final

from flywheel_client._bench.histogram import PERCENTILES, Histogram
from flywheel_client._bench.report import LATENCY_TITLES, Report

HISTOGRAM_ROWS: Final = 10
WIDTH: Final = 80
BAR_WIDTH: Final = 40
EIGHTHS: Final = " ▏▎▍▌▋▊▉█"
MAX_MESSAGE_LENGTH: Final = 100
MIN_SHOWN_AS_WHOLE: Final = 99.95
MIN_SHOWN_IN_SECONDS: Final = 0.9995
"""A shorter duration is shown in milliseconds, of which it has at most 999."""

NOT_THE_LIMIT: Final = "The bench was not the limit."


def report_lines(report: Report, *, blocks: bool) -> Iterator[str]:
    """Yields the lines of a report of at most about 80 columns.

    Args:
        report: The report.
        blocks: Whether the output can show block characters, which make bars finer than "#".
    """
    setup = report.setup
    yield f"{setup.model or 'unknown model'} ({setup.engine or 'unknown engine'}) at {setup.server}"
    connections = "1 connection" if setup.connections == 1 else f"{setup.connections} connections"
    yield f"{setup.method}, {setup.load}"
    yield f"{connections}, prompts: {setup.prompts}"
    yield ""
    yield from table(
        [
            ["run", f"{report.seconds:.1f} s"],
            ["calls", f"{report.calls_succeeded:,} succeeded, {report.calls_failed:,} failed"],
            ["rate", f"{format_number(report.calls_per_second)} calls/s"],
            ["output", f"{report.generated_tokens:,} tokens, {format_number(report.generated_tokens_per_second)} tokens/s"],
            ["prompts", f"{report.prompt_tokens:,} tokens"],
        ]
    )
    if report.latencies:
        yield ""
        yield from table(
            [
                ["", *(f"p{percent:g}" for percent in PERCENTILES), "max", "mean"],
                *([LATENCY_TITLES[name], *latency_cells(histogram)] for name, histogram in report.latencies.items()),
            ],
            align_right=True,
        )
    if report.errors:
        yield ""
        yield "failed calls"
        for error in report.errors:
            yield f"  {error.count}  {error.code} {error.reason}".rstrip() + f": {_cut(error.message)}"
    for name in ("first_token", "duration"):
        if name in report.latencies:
            yield ""
            yield LATENCY_TITLES[name]
            yield from histogram_lines(report.latencies[name], blocks=blocks)
            break
    yield ""
    for text in (*report.notes, verdict(report)):
        yield from textwrap.wrap(text, WIDTH)


def verdict(report: Report) -> str:
    """Returns whether the bench was the limit, in words."""
    if not report.calls_sent:
        return "Nothing was measured, because no call was sent."
    usage = report.bench
    facts = (
        f"Its event loop used {usage.loop_cpu_share:.0%} of a processor (all threads: {usage.cpu_share:.0%}), and was "
        f"{format_seconds(usage.loop_lag)} late (p99)."
    )
    if not report.bench_limits:
        return f"{NOT_THE_LIMIT} {facts}"
    headline = (
        "THE BENCH, NOT THE SERVER, WAS THE LIMIT" if usage.was_busy else "THE BENCH WAS LATE, so the latencies are not exact"
    )
    reasons = "; ".join(report.bench_limits)
    return (
        f"{headline}: {reasons}. The server may be faster than these figures. Lower the load, use a machine that does nothing "
        f"else, or run several benches at once. {facts}"
    )


def latency_cells(histogram: Histogram) -> list[str]:
    """Returns the percentiles, the maximum and the mean of durations for people."""
    figures = [*(histogram.percentile(percent) for percent in PERCENTILES), histogram.max, histogram.mean]
    return [format_seconds(figure) for figure in figures]


def format_seconds(seconds: float) -> str:
    """Returns a duration with three digits or more and a unit."""
    unit, size = ("s", 1.0) if seconds >= MIN_SHOWN_IN_SECONDS else ("ms", 1000.0)
    digits = f"{seconds * size:.3g}"
    return f"{seconds * size:.0f} {unit}" if "e+" in digits else f"{digits} {unit}"


def format_number(number: float) -> str:
    """Returns a number for people: with a fraction if it is small, and with commas if it is large."""
    return f"{number:,.0f}" if number >= MIN_SHOWN_AS_WHOLE else f"{number:.3g}"


def histogram_lines(histogram: Histogram, *, blocks: bool) -> Iterator[str]:
    """Yields a line with a bar for each range of durations. `blocks` is as in `report_lines`."""
    rows = histogram.rows(HISTOGRAM_ROWS)
    highest = max(count for _, _, count in rows)
    labels = [f"{format_seconds(low)} to {format_seconds(high)}" for low, high, _ in rows]
    width = max(map(len, labels))
    for label, (_, _, count) in zip(labels, rows, strict=True):
        yield f"  {label.rjust(width)}  {_bar(count / highest, blocks=blocks)}{' ' if count else ''}{count}"


def _bar(share: float, *, blocks: bool) -> str:
    if not blocks:
        return "#" * round(share * BAR_WIDTH)
    whole, eighths = divmod(round(share * BAR_WIDTH * 8), 8)
    return EIGHTHS[8] * whole + EIGHTHS[eighths].strip()


def _cut(message: str) -> str:
    return message if len(message) <= MAX_MESSAGE_LENGTH else message[: MAX_MESSAGE_LENGTH - 1] + "…"


def table(rows: Sequence[Sequence[str]], *, align_right: bool = False) -> Iterator[str]:
    """Yields the lines of a table. `align_right` is for all columns but the first."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *cells in rows:
        aligned = [
            cell.rjust(width) if align_right else cell.ljust(width) for cell, width in zip(cells, widths[1:], strict=True)
        ]
        yield "  ".join([first.ljust(widths[0]), *aligned]).rstrip()
