"""An HTTP server that gives the metrics that a test has set, or whatever else a test wants a client to bear."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]

HOSTILE = 'x\x1b]0;y\x07\x9b2J\u202e\\"[red]'
"""The value of a label, as the text format spells it, with escape sequences, a bidirectional control and markup."""


@dataclass
class FakeMetrics:
    """A server of metrics. Samples are kept by their names and labels, as in `flywheel_calls_refused_total{reason="A"}`."""

    address: str = ""
    samples: dict[str, float | str] = field(default_factory=dict)
    answer: Answer | None = None
    """What the server does with a request; by default, it sends the samples."""
    requests: list[bytes] = field(default_factory=list)
    _port: int = 0
    _server: asyncio.Server | None = None

    def text(self) -> bytes:
        return "".join(f"{name} {value}\n" for name, value in self.samples.items()).encode()

    def count(self, added: float = 1, *names: str) -> None:
        for name in names:
            self.samples[name] = float(self.samples.get(name, 0)) + added

    def observe(self, histogram: str, labels: str = "", **buckets: int) -> None:
        """Counts observations: `le_0_1=3` are three of at most 0.1 that are above the bound before."""
        total = 0
        for name, number in buckets.items():
            total += number
            bound = name.removeprefix("le_").replace("_", ".")
            self.count(total, f'{histogram}_bucket{{{labels}{"," * bool(labels)}le="{bound}"}}')
        self.count(total, f"{histogram}_count{{{labels}}}" if labels else f"{histogram}_count")

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]
        self.address = f"127.0.0.1:{self._port}"

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            self.requests.append(await reader.readuntil(b"\r\n\r\n"))
            await (self.answer or self._send)(writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _send(self, writer: asyncio.StreamWriter) -> None:
        await raw(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\n" + self.text())(writer)


def raw(data: bytes) -> Answer:
    """Returns an answer of these bytes."""

    async def send(writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await writer.drain()

    return send


@asynccontextmanager
async def fake_metrics() -> AsyncIterator[FakeMetrics]:
    """Serves metrics for the length of the context."""
    fake = FakeMetrics(samples={"flywheel_engine_up": 1, 'flywheel_build_info{version="1.2",engine="scripted",model="m"}': 1})
    await fake.start()
    try:
        yield fake
    finally:
        await fake.stop()
