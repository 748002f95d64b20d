"""Lays out the figures of one server, or of all, in lines of text. Every state is a word: nothing depends on colour."""

from collections.abc import Iterable
from typing import Final

from rich.cells import set_cell_size
from rich.text import Text

from flywheel_client._top.figures import Figures, Latency
from flywheel_client._top.formats import NONE, bar, count, cut, number, percent, quantile, seconds, sparkline
from flywheel_client._top.servers import History, Server

STATE_STYLES: Final = {"up": "green", "engine down": "bold red", "no answer": "bold red", "restarted": "bold yellow"}
ALL_SERVERS: Final = "all servers"

_WITH_SPARKLINES: Final = ("calls/s", "tokens/s", "first token", "per token", "queue wait")
_WITHOUT: Final = ("slots", "engine", "process")

NAME_WIDTH: Final = 13
_FIGURES_WIDTH: Final = 42
"""The width of what stands before a sparkline."""

_BAR_WIDTH: Final = 10


def title(server: Server | None, figures: Figures | None, width: int, now: float) -> Text:
    """Returns the line that names a server, or all if it is None: its state, version, engine, model and age."""
    name, state = (server.address, server.state) if server else (ALL_SERVERS, "")
    line = Text.assemble((name, "bold"), "  ", (state, STATE_STYLES.get(state, "")))
    if server and server.problem:
        line.append(f": {server.problem}")
    if figures is not None:
        facts = [figures.version and f"version {figures.version}", figures.engine, figures.model]
        facts.append(f"for {seconds(max(now - figures.started, 0.0))}" if figures.started else "")
        line.append("".join(f"  {fact}" for fact in facts if fact), style="dim")
    return cut(line, width)


def overview(figures: Figures | None, history: History, width: int) -> list[Text]:
    """Returns the lines of the overview; dashes if there are no figures."""
    if figures is None:
        return [cut(Text(f"{name:{NAME_WIDTH}}{NONE}", style="dim"), width) for name in (*_WITH_SPARKLINES, *_WITHOUT)]
    it = figures
    rates = [
        (f"{number(it.calls_per_second):>7}", f"failed {number(it.failed_per_second)}", history.calls),
        (f"{number(it.generated_tokens_per_second):>7}", f"prompt {number(it.prompt_tokens_per_second)}", history.tokens),
        (*_latency(it.first_token), history.first_token),
        (*_latency(it.per_token), history.per_token),
        (*_latency(it.queue_wait), history.queue_wait),
    ]
    lines = [_with_sparkline(name, *line, width) for name, line in zip(_WITH_SPARKLINES, rates, strict=True)]
    facts = zip(_WITHOUT, (_load(it), _engine(it), _process(it)), strict=True)
    lines += [cut(Text(f"{name:{NAME_WIDTH}}{fact}"), width) for name, fact in facts]
    if it.engine_up is False:
        lines[-2].stylize("bold red")
    return lines


def _load(it: Figures) -> str:
    context = f"  context {_share(it.context_tokens_reserved, it.context_tokens)}" if it.context_tokens else ""
    return f"{_share(it.slots_active, it.slots)}  queue {_of(it.slots_queued, it.queue_slots)}{context}"


def _engine(it: Figures) -> str:
    state = {None: NONE, True: "up", False: "DOWN"}[it.engine_up]
    facts = {"restarts": it.engine_restarts, "runners": it.runners, "backlog": it.backlog}
    counts = "".join(f"  {name} {count(value)}" for name, value in facts.items())
    return f"{state}{counts}  prompt tokens cached {percent(it.prompt_tokens_cached)}"


def _process(it: Figures) -> str:
    lost = f"  log lines lost {count(it.log_lines_dropped)}" if it.log_lines_dropped else ""
    use = f"CPU {percent(it.cpu)}  memory {number(it.memory_bytes, 'B')}  connections {count(it.connections)}"
    return f"{use}  loop lag p99 {quantile(it.loop_lag.p99)}{lost}"


def _latency(latency: Latency) -> tuple[str, str]:
    return f"p50 {quantile(latency.p50):>9}", f"p99 {quantile(latency.p99):>9}"


def _of(value: float | None, largest: float | None) -> str:
    return f"{count(value)}/{count(largest)}" if largest else count(value)


def _share(value: float | None, largest: float | None) -> str:
    return f"{_of(value, largest)} {bar(value, largest, _BAR_WIDTH)}".rstrip()


def _with_sparkline(name: str, first: str, second: str, values: Iterable[float | None], width: int) -> Text:
    line = Text(set_cell_size(f"{name:{NAME_WIDTH}}{first:<13}  {second}", _FIGURES_WIDTH))
    line.stylize("bold", NAME_WIDTH, _FIGURES_WIDTH)
    line.append(" " + sparkline(values, width - _FIGURES_WIDTH - 1), style="cyan")
    return cut(line, width)
