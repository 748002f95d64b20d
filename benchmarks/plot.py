"""Draws line and bar charts as SVG, small and readable as text. Constants are in pixels."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final
from xml.sax.saxutils import escape

WIDTH: Final = 760
LEFT_MARGIN: Final = 56
PANEL_HEIGHT: Final = 110
GAP_HEIGHT: Final = 42
BAR_HEIGHT: Final = 18
LABELS_WIDTH: Final = 190
"""Width of the labels to the left of bars."""
NUMBERS_WIDTH: Final = 70
"""Width of the numbers to the right of bars."""


@dataclass(frozen=True, slots=True)
class Panel:
    """A line chart of values over time, whose y axis begins at 0.

    Attributes:
        title: The title, with the unit.
        values: One value for each time.
        limit: The value at which to draw a dashed line, such as a maximum; None for no line.
    """

    title: str
    values: Sequence[float]
    limit: float | None = None


def chart(seconds: Sequence[float], panels: Sequence[Panel]) -> str:
    """Returns an SVG of the panels, one below the other, with a common time axis in seconds."""
    lines: list[str] = []
    for number, panel in enumerate(panels):
        lines += _draw(panel, seconds, top=GAP_HEIGHT + number * (PANEL_HEIGHT + GAP_HEIGHT))
    return _document(lines, len(panels) * (PANEL_HEIGHT + GAP_HEIGHT) + GAP_HEIGHT)


@dataclass(frozen=True, slots=True)
class Bar:
    """A value with its measured range.

    Attributes:
        label: The text to the left of the bar.
        value: The value, at least 0.
        least: The minimum of the range.
        most: The maximum of the range.
        shown: The text to the right of the bar.
    """

    label: str
    value: float
    least: float
    most: float
    shown: str


def bar_chart(groups: Sequence[tuple[str, Sequence[Bar]]]) -> str:
    """Returns an SVG of groups of horizontal bars. Each group has a title, and a scale of its own that begins at 0."""
    lines: list[str] = []
    top = 0
    for title, bars in groups:
        top += GAP_HEIGHT
        lines.append(f'<text x="{LABELS_WIDTH}" y="{top - 8}" font-weight="bold">{escape(title)}</text>')
        highest = max((bar.most for bar in bars), default=0) or 1
        for bar in bars:
            lines += _draw_bar(bar, (WIDTH - LABELS_WIDTH - NUMBERS_WIDTH) / highest, top)
            top += BAR_HEIGHT
    return _document(lines, top + GAP_HEIGHT // 2)


def _draw_bar(bar: Bar, scale: float, top: int) -> Iterator[str]:
    middle = top + BAR_HEIGHT / 2
    yield f'<text x="{LABELS_WIDTH - 6}" y="{middle + 4}" text-anchor="end">{escape(bar.label)}</text>'
    yield f'<rect x="{LABELS_WIDTH}" y="{top + 2}" width="{bar.value * scale:.1f}" height="{BAR_HEIGHT - 4}" fill="steelblue"/>'
    yield f'<path d="M{LABELS_WIDTH + bar.least * scale:.1f},{middle} H{LABELS_WIDTH + bar.most * scale:.1f}" stroke="black"/>'
    yield f'<text x="{LABELS_WIDTH + bar.most * scale + 6:.1f}" y="{middle + 4}">{escape(bar.shown)}</text>'


def _document(lines: Sequence[str], height: int) -> str:
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="12">'
    return "\n".join([svg, '<rect width="100%" height="100%" fill="white"/>', *lines, "</svg>", ""])


def _draw(panel: Panel, seconds: Sequence[float], top: int) -> Iterator[str]:
    highest = max(*panel.values, panel.limit or 0, 1)

    def y(value: float) -> float:
        return top + PANEL_HEIGHT * (1 - value / highest)

    def x(second: float) -> float:
        return LEFT_MARGIN + (WIDTH - LEFT_MARGIN - 16) * second / seconds[-1]

    points = " ".join(f"{x(second):.1f},{y(value):.1f}" for second, value in zip(seconds, panel.values, strict=True))
    yield f'<text x="{LEFT_MARGIN}" y="{top - 8}" font-weight="bold">{escape(panel.title)}</text>'
    yield f'<path d="M{LEFT_MARGIN},{top} V{top + PANEL_HEIGHT} H{WIDTH - 16}" fill="none" stroke="gray"/>'
    for value in (0, highest):
        yield f'<text x="{LEFT_MARGIN - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.0f}</text>'
    for second in (0, seconds[-1] / 2, seconds[-1]):
        yield f'<text x="{x(second):.1f}" y="{top + PANEL_HEIGHT + 15}" text-anchor="middle">{second:.0f} s</text>'
    if panel.limit is not None:
        yield f'<path d="M{LEFT_MARGIN},{y(panel.limit):.1f} H{WIDTH - 16}" stroke="firebrick" stroke-dasharray="5 4"/>'
    yield f'<polyline points="{points}" fill="none" stroke="steelblue" stroke-width="1.5"/>'
