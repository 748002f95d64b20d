"""The tables of the dashboard: the servers, and the panels of what callers, methods and calls do."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from rich.cells import set_cell_size
from rich.text import Text

from flywheel_client._top.figures import Figures, Latency
from flywheel_client._top.formats import NONE, count, cut, number, quantile
from flywheel_client._top.overview import ALL_SERVERS
from flywheel_client._top.servers import Event, Server


@dataclass(frozen=True)
class Column:
    """A column of a table: its heading, and its width (0 for the rest of the line).

    Texts are aligned to the left and sorted from A to Z. Numbers are aligned to the right, and the largest one is first.
    """

    heading: str
    width: int
    is_text: bool = False


@dataclass(frozen=True)
class Table:
    """A table: its columns, and for each row the keys to sort by and the texts of the cells."""

    columns: tuple[Column, ...]
    rows: Sequence[tuple[tuple[float | str, ...], tuple[str, ...]]]
    is_sorted: bool = True
    """Whether the rows can be sorted by a column; events keep their order."""


Panel = Callable[[Figures | None, Iterable[Event]], Table]


def _rates_first(name: str, *headings: str) -> tuple[Column, ...]:
    return (Column(name, 0, is_text=True), *(Column(heading, 10) for heading in headings))


def callers(figures: Figures | None, _events: Iterable[Event]) -> Table:
    """Returns the table of what each caller uses."""
    return Table(
        _rates_first("CALLER", "CALLS/S", "TOKENS/S", "CALLS", "TOKENS"),
        [
            (
                (it.caller, it.calls_per_second, it.tokens_per_second, it.calls, it.tokens),
                (
                    it.caller or NONE,
                    number(it.calls_per_second),
                    number(it.tokens_per_second),
                    count(it.calls),
                    count(it.tokens),
                ),
            )
            for it in (figures.callers if figures else ())
        ],
    )


def methods(figures: Figures | None, _events: Iterable[Event]) -> Table:
    """Returns the table of the calls of each method."""
    return Table(
        _rates_first("METHOD", "CALLS/S", "FAILED/S", "P50", "P99", "CALLS"),
        [
            (
                (it.method, it.calls_per_second, it.failed_per_second, *_keys(it.duration), it.calls),
                (it.method, number(it.calls_per_second), number(it.failed_per_second), *_texts(it.duration), count(it.calls)),
            )
            for it in (figures.methods if figures else ())
        ],
    )


def ended_early(figures: Figures | None, _events: Iterable[Event]) -> Table:
    """Returns the table of calls that were refused, cancelled, or ended for another reason."""
    return Table(
        _rates_first("REFUSED, CANCELLED, ENDED", "PER S", "CALLS"),
        [
            ((it.what, it.per_second, it.calls), (it.what, number(it.per_second), count(it.calls)))
            for it in (figures.ended_early if figures else ())
        ],
    )


def events(_figures: Figures | None, happened: Iterable[Event]) -> Table:
    """Returns the table of what happened, newest first."""
    return Table(
        (Column("TIME", 8, is_text=True), Column("SERVER", 22, is_text=True), Column("WHAT HAPPENED", 0, is_text=True)),
        [
            (
                (),
                (
                    time.strftime("%H:%M:%S", time.localtime(it.when)),
                    it.address,
                    f"{it.text}{f' x{it.times}' * (it.times > 1)}",
                ),
            )
            for it in happened
        ],
        is_sorted=False,
    )


PANELS: Final[dict[str, Panel]] = {"Callers": callers, "Methods": methods, "Refusals": ended_early, "Events": events}


SORT_FIRST: Final = 1
"""The column that a panel is sorted by at first: the first rate."""


def servers_table(servers: Iterable[Server], total: Figures | None) -> Table:
    """Returns the table of the servers, after the sum of all of them."""
    rows = [(ALL_SERVERS, "", total), *((it.address, it.state, it.figures) for it in servers)]
    headings = ("ACTIVE", "QUEUED", "CALLS/S", "TOKENS/S", "FIRST P99")
    return Table(
        (Column("SERVER", 0, is_text=True), Column("STATE", 11, is_text=True), *(Column(heading, 9) for heading in headings)),
        [((), (address, state, *_server_cells(figures))) for address, state, figures in rows],
        is_sorted=False,
    )


def _server_cells(it: Figures | None) -> tuple[str, ...]:
    if it is None:
        return (NONE,) * 5
    rates = number(it.calls_per_second), number(it.generated_tokens_per_second)
    return count(it.active), count(it.queued), *rates, quantile(it.first_token.p99)


def table_lines(table: Table, width: int, sort_by: int | None = None, *, reverse: bool = False) -> list[Text]:
    """Returns the heading and the rows of a table; sorted by a column if the table can be sorted."""
    rows, columns = list(table.rows), table.columns
    if table.is_sorted and sort_by is not None:
        rows.sort(key=lambda row: row[0][sort_by], reverse=columns[sort_by].is_text == reverse)
    rest = max(width - sum(column.width + 1 for column in columns if column.width), 8)
    headings = [
        f"*{column.heading}" if table.is_sorted and index == sort_by else column.heading for index, column in enumerate(columns)
    ]
    lines = [Text(_cells(headings, columns, rest), style="bold")]
    lines += [Text(_cells(cells, columns, rest)) for _, cells in rows]
    return [cut(line, width) for line in lines]


def _cells(texts: Iterable[str], columns: Iterable[Column], rest: int) -> str:
    return " ".join(
        set_cell_size(text, column.width or rest) if column.is_text else text[: column.width].rjust(column.width)
        for text, column in zip(texts, columns, strict=True)
    )


def _keys(latency: Latency) -> tuple[float, float]:
    return (latency.p50.seconds if latency.p50 else 0.0, latency.p99.seconds if latency.p99 else 0.0)


def _texts(latency: Latency) -> tuple[str, str]:
    return quantile(latency.p50), quantile(latency.p99)
