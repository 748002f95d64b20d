"""The events of an engine one by one, for tests that look at them, change them, or hold them up."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from typing import Any

from flywheel_server.engines.base import Event, PreparedRequest, Sink
from flywheel_server.engines.scripted import ScriptedEngine

MAX_HELD = 8
"""Events that wait before an engine that can pause does so."""

Generate = Callable[[PreparedRequest, Sink], Awaitable[None]]


class _Queue:
    def __init__(self) -> None:
        self.events: asyncio.Queue[Event | None] = asyncio.Queue()

    @property
    def is_full(self) -> bool:
        return self.events.qsize() >= MAX_HELD

    def emit(self, event: Event) -> None:
        self.events.put_nowait(event)


async def pulled(generate: Generate, prepared: PreparedRequest) -> AsyncGenerator[Event, None]:
    """Yields what the method emits, and raises what it raises; closing it cancels the method."""
    queue = _Queue()
    generating = asyncio.ensure_future(generate(prepared, queue))
    generating.add_done_callback(lambda _: queue.events.put_nowait(None))
    try:
        while event := await queue.events.get():
            yield event
        await generating
    finally:
        generating.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await generating


class PulledEngine(ScriptedEngine):
    """A scripted engine whose `events` a subclass may change."""

    async def generate(self, prepared: PreparedRequest, sink: Sink) -> None:
        async with aclosing(self.events(prepared)) as events:
            async for event in events:
                while sink.is_full:  # noqa: ASYNC110 - as engines do that make a step now and then
                    await asyncio.sleep(0.001)
                sink.emit(event)

    def events(self, prepared: PreparedRequest) -> Any:
        """Yields the events of the request."""
        return pulled(super().generate, prepared)
