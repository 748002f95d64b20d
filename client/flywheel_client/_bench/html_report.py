"""Writes a report as one page of HTML, with plots in SVG, and without scripts or anything from elsewhere."""

from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any, Final

from flywheel_proto import __version__

from flywheel_client._bench.histogram import PERCENTILES
from flywheel_client._bench.plots import Line, histogram_plot, timeline_plot
from flywheel_client._bench.report import LATENCY_TITLES, Report
from flywheel_client._bench.terminal_report import format_number, latency_cells, verdict

# The policy forbids scripts and everything from elsewhere, even if a text of the server could get into the page as markup.
_HEAD: Final = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>flywheel bench: {title}</title>
<style>
:root {
  color-scheme: light dark;
  --text: #1c2024; --soft: #60646c; --line: #d9d9e0; --back: #fff; --accent: #3358d4; --bad: #ce2c31;
}
@media (prefers-color-scheme: dark) {
  :root { --text: #edeef0; --soft: #b0b4ba; --line: #363a3f; --back: #111113; --accent: #9eb1ff; --bad: #ff9592; }
}
body {
  font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back);
  max-width: 760px; margin: 2em auto; padding: 0 1em;
}
h1 { font-size: 1.5em; margin-bottom: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1em; margin: 2em 0 .4em; }
p.sub { color: var(--soft); margin-top: .2em; overflow-wrap: anywhere; }
.verdict { border-left: 4px solid var(--accent); padding: .4em .8em; }
.verdict.limit { border-color: var(--bad); }
.figures { display: flex; flex-wrap: wrap; gap: .5em 2.5em; }
.figures b { display: block; font-size: 1.5em; font-weight: 600; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .25em .6em; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 500; }
th:first-child, td:first-child, .text { text-align: left; }
td.text { white-space: normal; overflow-wrap: anywhere; }
svg { width: 100%; height: auto; }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft); }
polyline, path { fill: none; stroke-width: 1.5; }
.bar, circle.first { fill: var(--accent); }
circle.second { fill: var(--bad); }
.first { stroke: var(--accent); }
.second { stroke: var(--bad); }
.grid { stroke: var(--line); stroke-width: 1; }
.mark { stroke: var(--bad); stroke-width: 1; stroke-dasharray: 3 3; }
</style>
</head>
<body>
"""


def html_page(report: Report) -> str:
    """Returns the page."""
    title = f"{report.setup.model or 'unknown model'} at {report.setup.server}"
    return "\n".join([_HEAD.replace("{title}", escape(title)), *_body(report), "</body>", "</html>", ""])


def _body(report: Report) -> Iterator[str]:
    setup = report.setup
    begun = datetime.fromtimestamp(report.begun, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    yield f"<h1>{escape(setup.model or 'unknown model')} <small>({escape(setup.engine or 'unknown engine')})</small></h1>"
    yield _paragraph(f"{setup.server} · {setup.method} · {setup.load} · {begun} · {report.seconds:.1f} s", "sub")
    yield _paragraph(verdict(report), "verdict limit" if report.bench_limits else "verdict")
    for note in report.notes:
        yield _paragraph(note)
    yield '<div class="figures">'
    yield _figure(format_number(report.calls_per_second), "calls/s")
    yield _figure(format_number(report.generated_tokens_per_second), "generated tokens/s")
    yield _figure(f"{report.calls_succeeded:,}", "calls succeeded")
    yield _figure(f"{report.calls_failed:,}", "calls failed")
    yield "</div>"
    if report.latencies:
        yield "<h2>Latencies</h2>"
        head = ["", *(f"p{percent:g}" for percent in PERCENTILES), "max", "mean", "count"]
        rows = [[LATENCY_TITLES[name], *latency_cells(each), str(each.count)] for name, each in report.latencies.items()]
        yield _table(head, rows)
    if report.errors:
        yield "<h2>Failed calls</h2>"
        rows = [[str(error.count), error.code, error.reason, error.message] for error in report.errors]
        yield _table(["Calls", "Code", "Reason", "First message"], rows, text_from=1)
    yield from _timelines(report)
    for name, histogram in report.latencies.items():
        title = LATENCY_TITLES[name]
        yield f"<h2>{escape(title[0].upper() + title[1:])}</h2>"
        yield histogram_plot(histogram, f"How often which {title} occurred")
    yield "<h2>Setup</h2>"
    facts = {"prompts": setup.prompts, "connections": setup.connections, "timeout of a call (s)": setup.timeout, **setup.fields}
    yield _table(["Option", "Value"], [[name, str(value)] for name, value in facts.items()], text_from=1)
    yield _paragraph(f"Made by flywheel bench {__version__}.", "sub")


def _timelines(report: Report) -> Iterator[str]:
    timeline = report.timeline
    length = timeline["interval_seconds"]
    wait = "time to first token" if "first_token" in report.latencies else "call duration"
    plots: list[tuple[str, list[Line], bool]] = [
        (
            f"The {wait}, by when the call was due",
            [Line("p50", "first", timeline["wait_p50"]), Line("p99", "second", timeline["wait_p99"])],
            True,
        ),
        ("Generated tokens per second", [Line("tokens/s", "first", _rates(timeline["tokens"], length))], False),
        (
            "Calls per second",
            [
                Line("due", "first", _rates(timeline["sent"], length)),
                Line("failed", "second", _rates(timeline["failed"], length)),
            ],
            False,
        ),
    ]
    for title, lines, durations in plots:
        yield f"<h2>{escape(title)}</h2>"
        yield timeline_plot(length, timeline["seconds"], lines, title, durations=durations)


def _rates(counts: Iterable[int], seconds: float) -> list[float | None]:
    return [count / seconds for count in counts]


def _paragraph(text: str, style: str = "") -> str:
    return f'<p class="{style}">{escape(text)}</p>' if style else f"<p>{escape(text)}</p>"


def _figure(value: str, name: str) -> str:
    return f"<div><b>{escape(value)}</b>{escape(name)}</div>"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]], text_from: int | None = None) -> str:
    """Returns a table. The columns from the number `text_from` on have texts, and the others have figures."""

    def cell(kind: str, number: int, text: str) -> str:
        style = ' class="text"' if text_from is not None and number >= text_from else ""
        return f"<{kind}{style}>{escape(text)}</{kind}>"

    lines = [f"<tr>{''.join(cell('th', number, text) for number, text in enumerate(head))}</tr>"]
    lines += [f"<tr>{''.join(cell('td', number, text) for number, text in enumerate(row))}</tr>" for row in rows]
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'
