"""Writes the results as tables in Markdown, and as plots."""

import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from benchmarks import figures
from benchmarks.figures import Figure, Spread
from benchmarks.peers import Peer
from benchmarks.plot import Bar, bar_chart
from benchmarks.runs import Run
from benchmarks.scenarios import Scenario
from benchmarks.targets import TARGETS

MIN_STREAMS_FOR_MEMORY: Final = 64
"""Minimum number of streams for which memory per stream is reported: with fewer, the growth of the process itself dominates."""

REPORTED_PACKAGES: Final = ("grpcio", "uvloop", "fastapi", "uvicorn", "xllamacpp")
"""The packages whose versions are reported, because they influence the results."""

INTRODUCTION: Final = """\
A cell has the median of the rounds, with the minimum and the maximum in brackets. A ratio divides the first server of a table
by the server of the row. It is taken within each round, in which both ran one shortly after the other. CPU is the CPU time of
all processes of the server, and includes the start and the end of calls. The load client measures the times. For paced streams,
the time to the first message includes the engine's: the delay of a token, and with our engine, which makes one step for all
streams at once, also the rest of the step that runs when the call arrives. Servers and load client share the cores, so CPU says
more than speed. A call failed if it did not end with OK, if it was ended because it took more than 1.5 times as long as it
should, or if its text or its number of tokens is wrong.
"""

Row = tuple[Peer, Sequence[Run]]


def write(runs: Sequence[Run], peers: Sequence[Peer], scenarios: Sequence[Scenario], folder: Path) -> str:
    """Writes the tables and plots into a folder, and returns the tables."""
    tables = [(scenario, rows) for scenario in scenarios if (rows := _rows(runs, peers, scenario))]
    plots = {"cpu": _plot_cpu(tables), "first": _plot_first(tables)}
    for name, plot in plots.items():
        (folder / f"{name}.svg").write_text(plot)
    lines = [
        "# Speed",
        "",
        _when_and_where(runs),
        "",
        INTRODUCTION,
        "![CPU](cpu.svg)",
        "",
        "![Time to the first message](first.svg)",
        "",
        *_targets(runs),
        *(line for scenario, rows in tables for line in table(scenario, rows)),
    ]
    text = "\n".join(lines)
    (folder / "speed.md").write_text(text)
    return text


def summary(run: Run) -> str:
    """Returns one line with the main figures of a run."""
    first = figures.FIRST_P50(run)
    return (
        f"{run.scenario}, {run.peer}: {figures.cpu(run) or 0:.0f} µs of CPU, {figures.tokens_per_second(run):,.0f} tokens/s, "
        f"first message after {first or 0:.1f} ms, {figures.failures(run)} of {run.load['calls']} calls failed"
    )


def table(scenario: Scenario, rows: Sequence[Row]) -> list[str]:
    """Returns the lines of the table of a scenario, with a heading."""
    header, cells = _model_table(scenario, rows) if scenario.kind == "model" else _scripted_table(scenario, rows)
    return [f"## {scenario.name}: {_described(scenario)}", "", *_markdown(header, cells), ""]


def _scripted_table(scenario: Scenario, rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    first = rows[0][1]
    unit = scenario.unit
    header = [
        "server",
        f"CPU µs per {unit}",
        "ratio",
        f"{unit}s/s",
        *("first message ms p50", "p99", "gap ms p50", "p99"),
        "tokens per message",
        "KiB per stream",
        f"client's CPU µs per {unit}",
        "failed",
    ]
    return header, [
        [
            peer.title,
            with_range(figures.spread(runs, figures.cpu)),
            "" if runs is first else with_range(figures.ratio(first, runs, figures.cpu)),
            with_range(figures.spread(runs, figures.tokens_per_second)),
            *_times(runs),
            median(figures.spread(runs, figures.tokens_per_message)),
            median(figures.spread(runs, lambda run: figures.memory(run, scenario.streams)))
            if scenario.streams >= MIN_STREAMS_FOR_MEMORY
            else "",
            median(figures.spread(runs, figures.client_cpu)),
            _failed(runs),
        ]
        for peer, runs in rows
    ]


def _model_table(scenario: Scenario, rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    first = rows[0][1]
    header = [
        *("server", "tokens/s", "ratio", "first token ms p50", "p99", "gap ms p50", "p99", "CPU µs per token"),
        *(("speed kept", "long prompt s") if scenario.interrupted else ()),
        *("start s", "failed"),
    ]
    interruption: Sequence[Figure] = (figures.kept, figures.prompt_seconds) if scenario.interrupted else ()
    return header, [
        [
            peer.title,
            with_range(figures.spread(runs, figures.tokens_per_second)),
            "" if runs is first else with_range(figures.ratio(first, runs, figures.tokens_per_second)),
            *_times(runs),
            median(figures.spread(runs, figures.cpu)),
            *(with_range(figures.spread(runs, figure)) for figure in interruption),
            median(figures.spread(runs, figures.start_seconds)),
            _failed(runs),
        ]
        for peer, runs in rows
    ]


def _times(runs: Sequence[Run]) -> list[str]:
    return [
        with_range(figures.spread(runs, figures.FIRST_P50)),
        median(figures.spread(runs, figures.FIRST_P99)),
        median(figures.spread(runs, figures.GAP_P50)),
        median(figures.spread(runs, figures.GAP_P99)),
    ]


def _failed(runs: Sequence[Run]) -> str:
    return f"{sum(map(figures.failures, runs)):,} of {sum(run.load['calls'] for run in runs):,}"


def _targets(runs: Sequence[Run]) -> list[str]:
    """Returns the lines of the table of targets, for all that were measured."""
    cells = [
        [
            target.title,
            target.scenario,
            f"at {'least' if target.is_minimum else 'most'} {target.limit:g}",
            with_range(reached),
            "yes" if target.is_met(reached) else "**no**",
        ]
        for target in TARGETS
        if (reached := target.reached(runs))
    ]
    return ["## Targets", "", *_markdown(["figure", "scenario", "target", "measured", "met"], cells), ""] if cells else []


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def _rows(runs: Sequence[Run], peers: Sequence[Peer], scenario: Scenario) -> list[Row]:
    return [(peer, of_peer) for peer in peers if (of_peer := figures.select(runs, scenario.name, peer.name))]


def _described(scenario: Scenario) -> str:
    """Returns a description of a scenario."""
    many = f"{scenario.streams:,} {'caller' if scenario.kind == 'unary' else 'stream'}{'s' if scenario.streams > 1 else ''}"
    if scenario.interrupted:
        return f"{many} of a model, while another caller's long prompt is read"
    return {
        "paced": f"{many} of {scenario.rate} tokens/s",
        "unpaced": f"{many} as fast as can be",
        "unary": f"{many} of whole answers, one call after the other",
        "model": f"{many} of a model",
    }[scenario.kind]


def _when_and_where(runs: Sequence[Run]) -> str:
    began = sorted(run.load["began"][:16].replace("T", " ") for run in runs)
    rounds = len({run.round for run in runs})
    return (
        f"{began[0]} to {began[-1]} UTC, {rounds} round{'s' if rounds > 1 else ''}. {os.cpu_count()} cores, "
        f"load average {os.getloadavg()[2]:.1f} in the last quarter of an hour. {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}, {', '.join(filter(None, map(_version, REPORTED_PACKAGES)))}."
    )


def _version(package: str) -> str:
    """Returns a package with its version; empty if it is not installed."""
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return ""


def _plot_cpu(tables: Sequence[tuple[Scenario, Sequence[Row]]]) -> str:
    return bar_chart(
        [
            (f"{scenario.name}: µs of the server's CPU per {scenario.unit}", _bars(rows, figures.cpu))
            for scenario, rows in tables
            if scenario.kind != "model"
        ]
    )


def _plot_first(tables: Sequence[tuple[Scenario, Sequence[Row]]]) -> str:
    return bar_chart(
        [(f"{scenario.name}: ms to the first message, median", _bars(rows, figures.FIRST_P50)) for scenario, rows in tables]
    )


def _bars(rows: Sequence[Row], figure: Figure) -> list[Bar]:
    spreads = ((peer.title, figures.spread(runs, figure)) for peer, runs in rows)
    return [Bar(title, shown.median, shown.least, shown.most, median(shown)) for title, shown in spreads if shown]


def with_range(spread: Spread | None) -> str:
    """Returns a median with its range, each with about three digits; only the median if the range is empty."""
    if spread is None or spread.least == spread.most:
        return median(spread)
    return f"{digits(spread.median)} ({digits(spread.least)} to {digits(spread.most)})"


def median(spread: Spread | None) -> str:
    """Returns a median with about three digits; empty if there is none."""
    return "" if spread is None else digits(spread.median)


def digits(value: float) -> str:
    """Returns a number with about three digits, and a comma between thousands."""
    decimals = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2  # noqa: PLR2004 - three digits minus those before the point
    return f"{value:,.{decimals}f}"
