"""Line and bar charts as SVG: small, readable as text, and the same everywhere."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final
from xml.sax.saxutils import escape

WIDTH: Final = 760
LEFT: Final = 56
PANEL: Final = 110
GAP: Final = 42
BAR: Final = 18
LABELS: Final = 190
"""The width of the labels beside bars."""
NUMBERS: Final = 70
"""The width of the numbers after them."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One line over time, drawn from 0 on.

    Attributes:
        title: What it shows, with the unit.
        values: One for each time.
        limit: Where to draw a dashed line, such as what must not be exceeded; None draws none.
    """

    title: str
    values: Sequence[float]
    limit: float | None = None


def chart(seconds: Sequence[float], panels: Sequence[Panel]) -> str:
    """Returns an SVG of the panels, one below the other over the same time."""
    lines: list[str] = []
    for number, panel in enumerate(panels):
        lines += _draw(panel, seconds, top=GAP + number * (PANEL + GAP))
    return _document(lines, len(panels) * (PANEL + GAP) + GAP)


@dataclass(frozen=True, slots=True)
class Bar:
    """A value with the range that it was measured in.

    Attributes:
        label: What has the value.
        value: The value, which is not negative.
        least: Where the range begins.
        most: Where the range ends.
        shown: The value in words.
    """

    label: str
    value: float
    least: float
    most: float
    shown: str


def bar_chart(groups: Sequence[tuple[str, Sequence[Bar]]]) -> str:
    """Returns an SVG of groups of horizontal bars, each group with its title and a scale of its own that begins at 0."""
    lines: list[str] = []
    top = 0
    for title, bars in groups:
        top += GAP
        lines.append(f'<text x="{LABELS}" y="{top - 8}" font-weight="bold">{escape(title)}</text>')
        highest = max((bar.most for bar in bars), default=0) or 1
        for bar in bars:
            lines += _draw_bar(bar, (WIDTH - LABELS - NUMBERS) / highest, top)
            top += BAR
    return _document(lines, top + GAP // 2)


def _draw_bar(bar: Bar, scale: float, top: int) -> Iterator[str]:
    middle = top + BAR / 2
    yield f'<text x="{LABELS - 6}" y="{middle + 4}" text-anchor="end">{escape(bar.label)}</text>'
    yield f'<rect x="{LABELS}" y="{top + 2}" width="{bar.value * scale:.1f}" height="{BAR - 4}" fill="steelblue"/>'
    yield f'<path d="M{LABELS + bar.least * scale:.1f},{middle} H{LABELS + bar.most * scale:.1f}" stroke="black"/>'
    yield f'<text x="{LABELS + bar.most * scale + 6:.1f}" y="{middle + 4}">{escape(bar.shown)}</text>'


def _document(lines: Sequence[str], height: int) -> str:
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="12">'
    return "\n".join([svg, '<rect width="100%" height="100%" fill="white"/>', *lines, "</svg>", ""])


def _draw(panel: Panel, seconds: Sequence[float], top: int) -> Iterator[str]:
    highest = max(*panel.values, panel.limit or 0, 1)

    def y(value: float) -> float:
        return top + PANEL * (1 - value / highest)

    def x(second: float) -> float:
        return LEFT + (WIDTH - LEFT - 16) * second / seconds[-1]

    points = " ".join(f"{x(second):.1f},{y(value):.1f}" for second, value in zip(seconds, panel.values, strict=True))
    yield f'<text x="{LEFT}" y="{top - 8}" font-weight="bold">{escape(panel.title)}</text>'
    yield f'<path d="M{LEFT},{top} V{top + PANEL} H{WIDTH - 16}" fill="none" stroke="gray"/>'
    for value in (0, highest):
        yield f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.0f}</text>'
    for second in (0, seconds[-1] / 2, seconds[-1]):
        yield f'<text x="{x(second):.1f}" y="{top + PANEL + 15}" text-anchor="middle">{second:.0f} s</text>'
    if panel.limit is not None:
        yield f'<path d="M{LEFT},{y(panel.limit):.1f} H{WIDTH - 16}" stroke="firebrick" stroke-dasharray="5 4"/>'
    yield f'<polyline points="{points}" fill="none" stroke="steelblue" stroke-width="1.5"/>'
