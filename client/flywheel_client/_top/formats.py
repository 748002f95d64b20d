"""Writes numbers, durations, sparklines and bars in few characters."""

import math
from collections.abc import Iterable
from typing import Final

from rich.text import Text

from flywheel_client._top.rates import Quantile

NONE: Final = "-"
"""Stands for a figure that the server does not have, or that nothing in the interval had."""

_SPARKS: Final = "▁▂▃▄▅▆▇█"
_TENTHS_BELOW: Final = 100.0
_HUNDREDTHS_BELOW: Final = 10.0


def number(value: float | None, unit: str = "") -> str:
    """Returns a number in at most six characters and its unit, such as 0.25, 12.4, 812 or 12.3k."""
    if value is None:
        return NONE
    if not math.isfinite(value):
        return "?"
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            divided = value / (1e3 if prefix == "k" else size)
            return f"{_digits(divided)}{prefix}{unit}" if divided < 1e4 else f"{divided:.0e}{prefix}{unit}"  # noqa: PLR2004
    return f"{_digits(value)}{unit}"


def count(value: float | None) -> str:
    """Returns a number of things, without decimals below 10,000."""
    return number(None if value is None or not math.isfinite(value) else float(round(value)))


def seconds(value: float | None) -> str:
    """Returns a duration in at most eight characters, such as 0.25 ms, 21 ms, 1.2 s, 5 min or 3 h."""
    if value is None:
        return NONE
    if not math.isfinite(value) or value < 0:
        return "?"
    for below, size, unit in ((1.0, 1e-3, "ms"), (100.0, 1.0, "s"), (6000.0, 60.0, "min"), (172_800.0, 3600.0, "h")):
        if value < below:
            return f"{_digits(value / size)} {unit}"
    return f"{number(float(round(value / 86_400)))} d"


def quantile(found: Quantile | None) -> str:
    """Returns a quantile; it begins with > if it is above the largest bound of the histogram."""
    return NONE if found is None else f"{'>' if found.is_above else ''}{seconds(found.seconds)}"


def percent(share: float | None) -> str:
    """Returns a share as a percentage."""
    return NONE if share is None or not math.isfinite(share) else f"{number(float(round(share * 100)))}%"


def sparkline(values: Iterable[float | None], width: int) -> str:
    """Returns the newest values as bars of a height from 0 to the largest one, aligned to the right; gaps for None."""
    newest = list(values)[-width:] if width > 0 else []
    known = [value for value in newest if value is not None and math.isfinite(value)]
    largest = max(known, default=0.0)
    bars = (" " if each is None or not math.isfinite(each) else _spark(each / largest if largest else 0.0) for each in newest)
    return "".join(bars).rjust(max(width, 0))


def bar(value: float | None, largest: float | None, width: int) -> str:
    """Returns a bar that is filled by the share that a value has of the largest one; empty if either is not known."""
    if value is None or not largest:
        return ""
    share = value / largest
    filled = round(min(share, 1.0) * width) if math.isfinite(share) else width
    return "█" * filled + "░" * (width - filled)


def cut(line: Text, width: int) -> Text:
    """Returns the line, cut to so many cells of the terminal and without spaces at its end."""
    line.truncate(width)
    line.rstrip()
    return line


def _spark(share: float) -> str:
    return _SPARKS[min(round(share * (len(_SPARKS) - 1)), len(_SPARKS) - 1)]


def _digits(value: float) -> str:
    """Returns about three digits of a number."""
    if value == int(value):
        return str(int(value))
    if value < _HUNDREDTHS_BELOW:
        return f"{value:.2f}"
    return f"{value:.1f}" if value < _TENTHS_BELOW else f"{value:.0f}"
