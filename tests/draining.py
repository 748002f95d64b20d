"""Servers that drain for as long as a test wants."""

import asyncio
import socket
from typing import Any

from flywheel_server.engines.base import Event, PreparedRequest, Sink, TextDelta
from flywheel_server.engines.scripted import Script, ScriptedEngine
from flywheel_server.server import serve
from flywheel_server.settings import Settings


class HeldEngine(ScriptedEngine):
    """Makes the first token of a long sample, and the others only when the test lets it."""

    def __init__(self) -> None:
        super().__init__(Script(text="abcd", bytes_per_token=4))
        self.may_go_on = asyncio.Event()
        self.calls = 0
        self.held = 0

    async def generate(self, prepared: PreparedRequest, sink: Sink) -> None:
        self.calls += 1
        await super().generate(prepared, _HeldSink(self, sink) if prepared.request.max_tokens > 1 else sink)


class _HeldSink:
    """Is full from the first token on, until the engine may go on."""

    def __init__(self, engine: HeldEngine, sink: Sink) -> None:
        self._engine = engine
        self._sink = sink
        self._holds = False

    @property
    def is_full(self) -> bool:
        return (self._holds and not self._engine.may_go_on.is_set()) or self._sink.is_full

    def emit(self, event: Event) -> None:
        self._sink.emit(event)
        if isinstance(event, TextDelta) and not self._holds:
            self._holds = True
            self._engine.held += 1


class Draining:
    """A server that drains for as long as a call runs, which the test ends."""

    def __init__(self, address: str, **settings: Any) -> None:
        self.engine = HeldEngine()
        self.address = address
        self._settings = Settings(address=address, **{"withdraw_window": 0, "drain_timeout": 60, **settings})
        self._leave = asyncio.Event()
        self._running = asyncio.create_task(self._run())

    async def _run(self) -> None:
        async with serve(self.engine, self._settings):
            await self._leave.wait()

    def stop(self) -> None:
        self._leave.set()

    async def stopped(self) -> None:
        await self._running

    @property
    def is_running(self) -> bool:
        return not self._running.done()

    def is_open(self) -> bool:
        """Whether its port takes connections."""
        host, _, port = self.address.rpartition(":")
        try:
            socket.create_connection((host, int(port))).close()
        except ConnectionRefusedError:
            return False
        return True
