"""The metrics of a server: when they are served, to whom, and what the page about the server says."""

import asyncio
import re
import subprocess
import sys
from html.parser import HTMLParser
from typing import Any

import pytest
from flywheel_proto import __version__
from flywheel_server.engines.scripted import Script, ScriptedEngine
from flywheel_server.listening import UnsafeError
from flywheel_server.metrics_endpoint import create_metrics, shown_settings
from flywheel_server.server import serve
from flywheel_server.settings import Settings
from flywheel_server.telemetry.status_page import quantile

from tests.serving import code_of, free_ports, serving
from tests.telemetry.scraping import get
from tests.telemetry.test_counting import OK, OK_CODE

KEY = "a-secret-key-of-16-characters"

WITHOUT_METRICS = """
import asyncio, sys
from flywheel_server import Settings, serve
from flywheel_server.engines.scripted import ScriptedEngine
from flywheel_client import AsyncClient

async def main():
    settings = Settings(address="127.0.0.1:0", engine="scripted", withdraw_window=0)
    async with serve(ScriptedEngine(), settings) as port, AsyncClient(f"127.0.0.1:{port}") as client:
        await client.generate_all("x", max_tokens=1)

asyncio.run(main())
print(*sys.modules)
"""


def test_a_server_without_metrics_imports_nothing_for_them() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_METRICS], capture_output=True, text=True, timeout=60, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "grpc" in loaded
    assert not loaded & {"prometheus_client", "h11", "grpc_channelz", "opentelemetry"}


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "192.0.2.1:9464", "example.com:9464"])
def test_metrics_are_not_for_the_network_unless_that_is_allowed(address: str) -> None:
    with pytest.raises(UnsafeError, match="--allow-network-metrics"):
        create_metrics(Settings(metrics_address=address))
    assert create_metrics(Settings(metrics_address=address, allow_network_metrics=True))


@pytest.mark.parametrize("address", ["127.0.0.1:0", "[::1]:0", "localhost:0", "127.1.2.3:0"])
def test_metrics_are_for_this_machine(address: str) -> None:
    assert create_metrics(Settings(metrics_address=address))


async def test_metrics_are_served_from_before_the_engine_starts_until_calls_have_ended() -> None:
    class Slow(ScriptedEngine):
        def __init__(self) -> None:
            super().__init__(Script())
            self.starts, self.may_start = asyncio.Event(), asyncio.Event()

        async def __aenter__(self) -> Any:
            self.starts.set()
            await self.may_start.wait()
            return await super().__aenter__()

    (port,) = free_ports(1)
    engine = Slow()

    async def run() -> None:
        settings = Settings(address="127.0.0.1:0", metrics_address=f"127.0.0.1:{port}", withdraw_window=0.5)
        async with serve(engine, settings):
            assert (await get(port)).status == 200

    server = asyncio.create_task(run())
    await engine.starts.wait()
    assert (await get(port)).status == 200
    engine.may_start.set()
    await server
    with pytest.raises(ConnectionRefusedError):
        await get(port)


class Page(HTMLParser):
    """The tables of a page: the cells of each row by the cell before them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: dict[str, list[str]] = {}
        self.tags: set[str] = set()
        self._row: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "tr":
            self._row = []
        elif tag in {"td", "th"}:
            self._row.append("")

    def handle_data(self, data: str) -> None:
        if self._row:
            self._row[-1] += data

    def handle_endtag(self, tag: str) -> None:
        if tag == "tr":
            self.rows[self._row[0]] = self._row[1:]
            self._row = []


async def test_the_page_has_the_build_the_figures_and_the_settings_without_secrets() -> None:
    (port,) = free_ports(1)
    settings = {"metrics_address": f"127.0.0.1:{port}", "api_keys": KEY}
    async with serving(ScriptedEngine(), **settings) as target:
        assert await code_of(target.stub.GenerateAll(OK, metadata=(("authorization", f"Bearer {KEY}"),))) is OK_CODE
        answer = await get(port, "/")
    html = answer.content.decode()
    page = Page(html)
    assert answer.headers["content-type"].startswith("text/html")
    assert page.rows["Version"] == [__version__]
    assert page.rows["Engine"] == ["scripted"]
    assert page.rows["Model"] == ["script"]
    assert page.rows["flywheel_generated_tokens_total"] == ["", "4"]
    assert page.rows["flywheel_queue_wait_seconds"][1] == "1"
    assert page.rows["api_keys"] == ["set"]
    assert page.rows["max_queued"] == ["128"]
    assert set(Settings.model_fields) <= set(page.rows)
    assert KEY not in html
    assert not page.tags & {"script", "img", "iframe", "form"}


def test_settings_without_keys_say_so() -> None:
    shown = {name: value for rows in shown_settings(Settings()).values() for name, value in rows}
    assert shown["api_keys"] == "not set"
    assert not re.search("SecretStr", str(shown))


@pytest.mark.parametrize(("share", "expected"), [(0.5, 1.5), (0.25, 1.25), (0.99, 2.0), (1.0, 2.0)])
def test_quantiles_are_those_of_prometheus(share: float, expected: float) -> None:
    assert quantile(share, [(1.0, 0), (2.0, 98), (float("inf"), 100)]) == pytest.approx(expected, abs=0.02)
