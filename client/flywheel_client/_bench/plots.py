"""Draws plots as SVG, for a page whose style sheet colours them. Lengths are in pixels."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

from flywheel_client._bench.histogram import PERCENTILES, Histogram
from flywheel_client._bench.terminal_report import format_number, format_seconds

WIDTH: Final = 720
HEIGHT: Final = 200
LEFT: Final = 64
RIGHT: Final = 16
TOP: Final = 22
BOTTOM: Final = 24
BARS: Final = 48
TICKS: Final = 4
MIN_MARK_DISTANCE: Final = 30
"""Percentiles whose marks are closer than this share a label."""


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a plot: its name, its class in the style sheet, and its values, of which None leaves a gap."""

    name: str
    style: str
    values: Sequence[float | None]


def histogram_plot(histogram: Histogram, title: str) -> str:
    """Returns a plot of how often which duration occurred, with marks at the percentiles."""
    rows = histogram.rows(BARS)
    highest = max(count for _, _, count in rows)
    width = (WIDTH - LEFT - RIGHT) / len(rows)
    drawn = list(_y_axis(highest, format_number))
    for number, (low, high, count) in enumerate(rows):
        top = _y(count, highest)
        label = f"{format_seconds(low)} to {format_seconds(high)}: {count}"
        drawn.append(
            f'<rect class="bar" x="{LEFT + number * width:.1f}" y="{top:.1f}" width="{max(width - 1, 0.5):.1f}" '
            f'height="{HEIGHT - BOTTOM - top:.1f}"><title>{escape(label)}</title></rect>'
        )
    for tick in range(TICKS + 1):
        number = round(tick * len(rows) / TICKS)
        limit = rows[number][0] if number < len(rows) else histogram.max
        drawn.append(_x_label(LEFT + number * width, format_seconds(limit)))
    drawn += _percentile_marks(histogram, rows, width)
    return _svg(drawn, title)


def timeline_plot(interval_seconds: float, seconds: float, lines: Sequence[Line], title: str, *, durations: bool) -> str:
    """Returns a plot of values over the time of the run, with a legend if there are several lines.

    Args:
        interval_seconds: The time between two values.
        seconds: How long the run took.
        lines: The lines.
        title: The title, for people who cannot see the plot.
        durations: Whether the values are durations in seconds.
    """
    highest = max((value for line in lines for value in line.values if value is not None), default=0) or 1
    longest = max((len(line.values) for line in lines), default=0)
    span = max(seconds, longest * interval_seconds) or 1
    drawn = list(_y_axis(highest, format_seconds if durations else format_number))
    step = _round_step(span / TICKS)
    times = [number * step for number in range(math.floor(span / step * 1.0001) + 1)]
    drawn += [_x_label(LEFT + time / span * (WIDTH - LEFT - RIGHT), f"{time:g} s") for time in times]
    for number, line in enumerate(lines):
        for points in _runs(line.values, interval_seconds, span, highest):
            if len(points) == 1:
                drawn.append(f'<circle class="{line.style}" cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}" r="2"/>')
            else:
                path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
                drawn.append(f'<polyline class="{line.style}" points="{path}"/>')
        if len(lines) > 1:
            x = LEFT + 12 + number * 110
            drawn.append(f'<path class="{line.style}" d="M{x},12 h18"/><text x="{x + 24}" y="16">{escape(line.name)}</text>')
    return _svg(drawn, title)


def _runs(
    values: Sequence[float | None], interval_seconds: float, span: float, highest: float
) -> Iterator[list[tuple[float, float]]]:
    """Yields the points of each part of a line that has no gap."""
    points: list[tuple[float, float]] = []
    for number, value in enumerate([*values, None]):
        if value is not None:
            x = LEFT + (number + 0.5) * interval_seconds / span * (WIDTH - LEFT - RIGHT)
            points.append((x, _y(value, highest)))
        elif points:
            yield points
            points = []


def _percentile_marks(histogram: Histogram, rows: Sequence[tuple[float, float, int]], width: float) -> Iterator[str]:
    marks: list[tuple[float, str]] = []
    for percent in PERCENTILES:
        value = histogram.percentile(percent)
        number = next((each for each, (_, high, _) in enumerate(rows) if value < high), len(rows) - 1)
        low, high, _ = rows[number]
        x = LEFT + (number + ((value - low) / (high - low) if high > low else 0.5)) * width
        if marks and x - marks[-1][0] < MIN_MARK_DISTANCE:
            marks[-1] = (marks[-1][0], f"{marks[-1][1]}, p{percent:g}")
        else:
            marks.append((x, f"p{percent:g}"))
        yield f'<path class="mark" d="M{x:.1f},{TOP} V{HEIGHT - BOTTOM}"/>'
    for x, label in marks:
        anchor = "end" if x > WIDTH - RIGHT - 60 else "middle"
        yield f'<text x="{x:.1f}" y="{TOP - 6}" text-anchor="{anchor}">{escape(label)}</text>'


def _y(value: float, highest: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * value / highest


def _y_axis(highest: float, shown: Callable[[float], str]) -> Iterator[str]:
    step = _round_step(highest / TICKS)
    for number in range(math.floor(highest / step * 1.0001) + 1):
        y = _y(number * step, highest)
        yield f'<path class="grid" d="M{LEFT},{y:.1f} H{WIDTH - RIGHT}"/>'
        yield f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(shown(number * step) if number else "0")}</text>'


def _round_step(step: float) -> float:
    """Returns the next number from the step on that is 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * 0.9999)


def _x_label(x: float, text: str) -> str:
    anchor = "end" if x > WIDTH - RIGHT - 10 else "middle"
    return f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(drawn: Sequence[str], title: str) -> str:
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
    return "\n".join([opening, f"<title>{escape(title)}</title>", *drawn, "</svg>"])
