"""The dashboard of `flywheel top`: what it shows, and what its keys do."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from flywheel_client import AsyncClient
from flywheel_client._top.app import Help, Top
from flywheel_client._top.overview import ALL_SERVERS
from flywheel_client._top.panels import PANELS
from flywheel_client._top.servers import Servers
from flywheel_server.engines.scripted import Script, ScriptedEngine
from rich.text import Text
from textual.widgets import Static

from tests.client.top.fake_metrics import HOSTILE, FakeMetrics, fake_metrics
from tests.serving import free_ports, serving, until
from tests.thorough import further

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from textual.pilot import Pilot

INTERVAL = 0.1
PARTS = ("servers", "title", "overview", "tabs", "panel")


class Screen:
    """What a dashboard shows, and the keys that a test presses."""

    def __init__(self, top: Top, pilot: Pilot[None]) -> None:
        self.top = top
        self.press = pilot.press
        self.pause = pilot.pause

    def part(self, name: str) -> str:
        content = self.top.screen_stack[0].query_one(f"#{name}", Static).content
        return content.plain if isinstance(content, Text) else str(content)

    def text(self) -> str:
        return "\n".join(self.part(name) for name in PARTS)

    async def shows(self, text: str, part: str | None = None) -> None:
        await until(lambda: text in (self.part(part) if part else self.text()), f"shows {text!r}")


@asynccontextmanager
async def dashboard(*addresses: str, size: tuple[int, int] = (80, 24)) -> AsyncIterator[Screen]:
    top = Top(Servers(addresses), INTERVAL)
    async with top.run_test(size=size) as pilot:
        yield Screen(top, pilot)


async def test_a_real_server_is_shown_with_its_calls() -> None:
    (port,) = free_ports(1)
    engine = ScriptedEngine(Script(token_delay=0.001))
    async with (
        serving(engine, metrics_address=f"127.0.0.1:{port}") as target,
        dashboard(f"localhost:{port}") as screen,
        AsyncClient(target.address) as client,
    ):
        await screen.shows("up", "title")
        await screen.press("right")
        async for _ in client.generate_deltas("A prompt.", max_tokens=20):
            pass
        await screen.shows("GenerateDeltas", "panel")
        await until(lambda: any(screen.top.servers.all[0].history.first_token), "the time to the first token")


async def test_rates_and_quantiles_are_shown() -> None:
    async with fake_metrics() as fake, dashboard(fake.address) as screen:
        await screen.shows("version 1.2  scripted  m")
        fake.count(500, "flywheel_generated_tokens_total")
        fake.observe("flywheel_queue_wait_seconds", le_0_25=10, le_0_5=0)
        await until(lambda: any(screen.top.servers.all[0].history.tokens), "a rate")
        assert any(screen.top.servers.all[0].history.queue_wait)
        await screen.shows("█", "overview")


async def test_a_server_that_goes_and_comes_back_says_so() -> None:
    async with fake_metrics() as fake, dashboard(fake.address) as screen:
        fake.samples["flywheel_slow_readers_total"] = 5
        await screen.shows("up", "title")
        await fake.stop()
        await screen.shows("no answer: Connection refused", "title")
        assert screen.part("overview").split("\n")[0].split() == ["calls/s", "-"]
        fake.samples["flywheel_slow_readers_total"] = 0
        await fake.start()
        await until(lambda: screen.top.servers.all[0].state == "up", "up again")
        await screen.press("left")
        happened = [line.split()[2:] for line in screen.part("panel").split("\n")[1:]]
        assert happened == [["restarted"], ["no", "answer:", "Connection", "refused"]]
        fake.samples["flywheel_engine_up"] = 0
        await screen.shows("engine down", "title")
        await screen.shows("DOWN", "overview")


async def test_several_servers_are_shown_one_by_one_and_added_up() -> None:
    async with fake_metrics() as one, fake_metrics() as other, dashboard(one.address, other.address, "127.0.0.1:1") as screen:
        one.samples["flywheel_calls_active"] = 3
        other.samples["flywheel_calls_active"] = 4
        await until(lambda: screen.part("servers").split("\n")[1].split()[2] == "7", "the sum")
        assert screen.part("title").startswith(ALL_SERVERS)
        assert "no answer" in screen.part("servers")
        await screen.press("down", "j")
        assert screen.part("title").startswith(other.address)
        await screen.press("down", "down", "down")
        assert screen.part("title").startswith("127.0.0.1:1  no answer")
        await screen.press("up", "k", "up", "up")
        assert screen.part("title").startswith(ALL_SERVERS)


@pytest.mark.thorough
async def test_a_table_of_many_servers_scrolls_to_the_chosen_one() -> None:
    async with dashboard(*(f"127.0.0.1:{port}" for port in range(1, 10))) as screen:
        await screen.press(*["down"] * 9)
        assert screen.part("servers").split("\n")[-1].split()[0] == "127.0.0.1:9"
        assert len(screen.part("servers").split("\n")) == 6


def with_callers(fake: FakeMetrics) -> None:
    for caller, calls in (("bob", 3), ("alice", 1), ("carol", 2)):
        fake.samples[f'flywheel_caller_calls_total{{caller="{caller}"}}'] = calls
        fake.samples[f'flywheel_caller_tokens_total{{caller="{caller}",type="output"}}'] = 10 - calls


async def test_panels_are_sorted_by_each_column_in_turn() -> None:
    async with fake_metrics() as fake, dashboard(fake.address) as screen:
        with_callers(fake)
        await screen.shows("carol", "panel")

        def order() -> str:
            heading, *rows = screen.part("panel").split("\n")
            (column,) = (word for word in heading.split() if word.startswith("*"))
            return column + "".join(f" {row.split()[0]}" for row in rows)

        assert order().startswith("*CALLS/S")
        await screen.press("s", "s")
        assert order() == "*CALLS bob carol alice"
        await screen.press("s")
        assert order() == "*TOKENS alice carol bob"
        await screen.press("s")
        assert order() == "*CALLER alice bob carol"
        await screen.press("r")
        assert order() == "*CALLER carol bob alice"


async def test_tab_and_arrows_go_round_the_panels() -> None:
    async with dashboard("127.0.0.1:1") as screen:
        for key, back in (("tab", "shift+tab"), ("right", "left")):
            headings = []
            for _ in PANELS:
                headings.append(screen.part("panel").split()[0])
                await screen.press(key)
            assert len(set(headings)) == len(PANELS)
            assert screen.top.panel == 0
            await screen.press(back)
            assert screen.top.panel == len(PANELS) - 1
            await screen.press(key)


async def test_a_pause_asks_no_server_and_keeps_what_is_shown() -> None:
    async with fake_metrics() as fake, dashboard(fake.address) as screen:
        await screen.shows("up", "title")
        await screen.press("p")
        await screen.shows("PAUSED", "tabs")
        await screen.pause(INTERVAL)
        asked = len(fake.requests)
        fake.samples["flywheel_connections"] = 42
        await screen.pause(3 * INTERVAL)
        assert len(fake.requests) == asked
        await screen.press("space")
        await screen.shows("connections 42")
        assert "PAUSED" not in screen.part("tabs")


async def test_help_opens_and_closes() -> None:
    async with fake_metrics() as fake, dashboard(fake.address) as screen:
        await screen.press("question_mark")
        assert isinstance(screen.top.screen, Help)
        before = len(fake.requests)
        await until(lambda: len(fake.requests) > before + 1, "the servers are asked meanwhile")
        await screen.press("q")
        assert not isinstance(screen.top.screen, Help)
        assert screen.top.return_code is None


@pytest.mark.parametrize("key", ["q", *further(["ctrl+c", "ctrl+q"])])
async def test_keys_quit(key: str) -> None:
    async with dashboard("127.0.0.1:1") as screen:
        await screen.press(key)
        await until(lambda: not screen.top.is_running, "ended")


@pytest.mark.parametrize("size", [(80, 24), *further([(1, 1), (20, 5), (40, 10), (200, 60)])])
async def test_it_fits_a_terminal_whatever_a_server_sends(size: tuple[int, int]) -> None:
    async with fake_metrics() as fake, dashboard(fake.address, "127.0.0.1:1", size=size) as screen:
        fake.samples[f'flywheel_build_info{{version="{HOSTILE}",engine="{HOSTILE * 9}",model="模型{HOSTILE}"}}'] = 1
        for index in range(100):
            fake.samples[f'flywheel_caller_calls_total{{caller="{HOSTILE}{index}"}}'] = f"1e{3 * index}"
        await until(lambda: screen.top.servers.all[0].state == "up", "up")
        for keys in (("down",), ("tab",), ("tab",), ("tab",), ("tab",), ("pagedown",), ("pageup",)):
            await screen.press(*keys)
            lines = [line for name in PARTS for line in screen.part(name).split("\n")]
            assert [line for line in lines if not line.isprintable() or Text(line).cell_len > size[0]] == []
