"""The dashboard of `flywheel top` on a terminal."""

import asyncio
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import ClassVar, Final

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.events import Key, Resize
from textual.screen import ModalScreen
from textual.widgets import Footer, Static

from flywheel_client._top.figures import Figures
from flywheel_client._top.formats import cut
from flywheel_client._top.overview import overview, title
from flywheel_client._top.panels import PANELS, SORT_FIRST, servers_table, table_lines
from flywheel_client._top.servers import History, Server, Servers

MAX_SERVER_LINES: Final = 5
"""The most lines of the table of servers, without its heading. The table scrolls to the chosen server."""

MAX_WAIT_FOR_SLOW_SERVER: Final = 1.0
"""Seconds for which the figures of the other servers wait for a slow one."""

EXIT_TERMINATED: Final = 128 + signal.SIGTERM

HELP: Final = """\
[b]flywheel top[/b]

 Up, Down (k, j)       another server; the first line is all of them
 Left, Right, Tab      another panel
 Page Up, Page Down    scroll the panel
 s                     sort the panel by the next column
 r                     reverse the order
 p, Space              pause: figures stay, no server is asked
 q, Ctrl-C             quit

Rates and quantiles are of the time between the last two scrapes;
- means that nothing was counted then. > means above the largest
bucket of the histogram. Sparklines begin at 0; the newest is right.
Tokens count when their call has ended.

Any key closes this help."""


class Help(ModalScreen[None]):
    """Explains the keys and the figures."""

    CSS = "Help { align: center middle; } Help Static { width: 72; height: auto; border: solid ansi_default; padding: 0 1; }"

    def compose(self) -> ComposeResult:
        """Yields the text."""
        yield Static(HELP)

    def on_key(self, event: Key) -> None:
        """Closes the help. The key does nothing else."""
        event.stop()
        self.dismiss()


class Top(App[None]):
    """Shows servers, and follows them until the user quits."""

    ENABLE_COMMAND_PALETTE = False
    CSS = """
    Screen { layout: vertical; overflow: hidden; }
    Static { height: auto; }
    #panel { height: 1fr; }
    #tabs { margin-top: 1; }
    Footer { background: ansi_default; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "Quit"),
        Binding("ctrl+c", "quit", show=False, priority=True),
        Binding("p,space", "pause", "Pause"),
        Binding("s", "sort", "Sort"),
        Binding("r", "reverse", "Reverse"),
        Binding("down,j", "server(1)", "Server", key_display="↑↓"),
        Binding("up,k", "server(-1)", show=False),
        Binding("right,l", "panel(1)", "Panel", key_display="←→"),
        Binding("left,h", "panel(-1)", show=False),
        Binding("tab", "panel(1)", show=False, priority=True),
        Binding("shift+tab", "panel(-1)", show=False, priority=True),
        Binding("pagedown", "scroll(1)", show=False),
        Binding("pageup", "scroll(-1)", show=False),
        Binding("question_mark", "help", "Help", key_display="?"),
        Binding("ctrl+z", "suspend_process", show=False),
    ]

    def __init__(self, servers: Servers, interval: float) -> None:
        super().__init__(ansi_color=True)
        self.theme = "ansi-dark"
        self.title = "flywheel top"
        self.servers = servers
        self.chosen = 0
        self.panel = 0
        self.sort_by = [SORT_FIRST] * len(PANELS)
        self.reverse = False
        self.first_row = 0
        self._interval = interval
        # Kept, because a query finds nothing on them while the help is in front of them.
        self._parts = {name: Static(id=name, markup=False) for name in ("servers", "title", "overview", "tabs", "panel")}
        self._asking = asyncio.Event()
        self._asking.set()
        self._total: Figures | None = None

    @property
    def is_paused(self) -> bool:
        """Whether the servers are not asked at the moment."""
        return not self._asking.is_set()

    def compose(self) -> ComposeResult:
        """Yields the parts of the screen, from top to bottom."""
        yield from self._parts.values()
        yield Footer()

    def on_mount(self) -> None:
        """Begins to follow the servers."""
        # Windows has no such handlers, and only the main thread may set one.
        with suppress(NotImplementedError, RuntimeError, ValueError):
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, lambda: self.exit(return_code=EXIT_TERMINATED))
        self.run_worker(self._follow())
        self.draw()

    def on_unmount(self) -> None:
        """Leaves SIGTERM as it was."""
        with suppress(NotImplementedError, RuntimeError, ValueError):
            asyncio.get_running_loop().remove_signal_handler(signal.SIGTERM)

    async def _follow(self) -> None:
        while True:
            await self._asking.wait()
            began = time.monotonic()
            await self.servers.poll(max_wait=min(self._interval, MAX_WAIT_FOR_SLOW_SERVER))
            # In a thread, because many servers have many figures.
            self._total = await asyncio.to_thread(self.servers.total)
            self.servers.total_history.add(self._total)
            self.draw()
            await asyncio.sleep(max(self._interval - (time.monotonic() - began), 0.0))

    def draw(self) -> None:
        """Draws everything anew."""
        server, figures, history = self._shown()
        width, height = self.size
        several = self._several
        if several:
            lines = table_lines(servers_table(self.servers.all, self._total), width)
            first = max(min(self.chosen - 2, len(lines) - 1 - MAX_SERVER_LINES), 0) + 1
            lines[self.chosen + 1].stylize("reverse")
            self._fill("servers", [lines[0], *lines[first : first + MAX_SERVER_LINES]])
        self._parts["servers"].display = several
        self._fill("title", [title(server, figures, width, time.time())])
        self._fill("overview", overview(figures, history, width))
        self._fill("tabs", [self._tabs(width)])
        panel = list(PANELS.values())[self.panel]
        happened = self.servers.events.of(server.address if server else None)
        heading, *rows = table_lines(panel(figures, happened), width, self.sort_by[self.panel], reverse=self.reverse)
        self.first_row = max(min(self.first_row, len(rows) - 1), 0)
        self._fill(
            "panel",
            [heading, *(rows[self.first_row : self.first_row + height] or [cut(Text("nothing yet", style="dim"), width)])],
        )

    def _shown(self) -> tuple[Server | None, Figures | None, History]:
        """Returns the chosen server, None for all of them, with its figures and its history."""
        if self._several and self.chosen == 0:
            return None, self._total, self.servers.total_history
        server = self.servers.all[max(self.chosen - 1, 0)]
        return server, server.figures, server.history

    @property
    def _several(self) -> bool:
        return len(self.servers.all) > 1

    def _fill(self, name: str, lines: Sequence[Text]) -> None:
        self._parts[name].update(Text("\n", no_wrap=True, end="").join(lines))

    def _tabs(self, width: int) -> Text:
        names = [Text(f" {name} ", style="reverse" if index == self.panel else "") for index, name in enumerate(PANELS)]
        line = Text(" ").join(names)
        state = "PAUSED" if self.is_paused else f"every {self._interval:g} s"
        line.append(
            f"{state}  {time.strftime('%H:%M:%S')}".rjust(width - line.cell_len), style="bold" if self.is_paused else "dim"
        )
        return cut(line, width)

    def action_pause(self) -> None:
        """Stops asking the servers, or asks them again."""
        if self.is_paused:
            self._asking.set()
        else:
            self._asking.clear()
        self.draw()

    def action_sort(self) -> None:
        """Sorts the panel by its next column."""
        columns = list(PANELS.values())[self.panel](None, ()).columns
        self.sort_by[self.panel] = (self.sort_by[self.panel] + 1) % len(columns)
        self.draw()

    def action_reverse(self) -> None:
        """Reverses the order of the panels."""
        self.reverse = not self.reverse
        self.draw()

    def action_server(self, step: int) -> None:
        """Shows another server; scrolls the panel if there is only one."""
        if self._several:
            self.chosen = max(min(self.chosen + step, len(self.servers.all)), 0)
            self.first_row = 0
        else:
            self.first_row += step
        self.draw()

    def action_panel(self, step: int) -> None:
        """Shows another panel."""
        self.panel = (self.panel + step) % len(PANELS)
        self.first_row = 0
        self.draw()

    def action_scroll(self, pages: int) -> None:
        """Scrolls the panel."""
        self.first_row += pages * max(self._parts["panel"].size.height - 2, 1)
        self.draw()

    def action_help(self) -> None:
        """Explains the keys and the figures."""
        self.push_screen(Help())

    def on_resize(self, _event: Resize) -> None:
        """Draws everything in the new size."""
        self.call_after_refresh(self.draw)
