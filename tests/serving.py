"""Servers for tests: the real one, in process, on a free port of the loopback interface."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import grpc.aio
from flywheel_proto.v1 import generation_pb2_grpc
from flywheel_server.engines.base import Engine
from flywheel_server.server import serve
from flywheel_server.settings import Settings


@dataclass(frozen=True)
class Target:
    """A server under test: where it is, a channel to it, and the stub of its service."""

    address: str
    channel: grpc.aio.Channel
    stub: Any


@asynccontextmanager
async def connected(address: str) -> AsyncIterator[Target]:
    """Gives a channel to the address, with its stub."""
    async with grpc.aio.insecure_channel(address) as channel:
        yield Target(address, channel, generation_pb2_grpc.GenerationServiceStub(channel))


@asynccontextmanager
async def serving(engine: Engine, **settings: Any) -> AsyncIterator[Target]:
    """Serves the engine, and stops without a drain."""
    configured = Settings(address="127.0.0.1:0", **{"withdraw_window": 0, "drain_timeout": 0, **settings})
    async with serve(engine, configured) as port, connected(f"127.0.0.1:{port}") as target:
        yield target


@asynccontextmanager
async def through_a_cable(address: str) -> AsyncIterator[tuple[str, Callable[[], None]]]:
    """Gives an address that leads to this one, and a function that cuts every connection made through it."""
    host, _, port = address.rpartition(":")
    writers: list[asyncio.StreamWriter] = []
    pumps: list[asyncio.Task[None]] = []

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(2**16):
                writer.write(data)
                await writer.drain()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward_reader, onward_writer = await asyncio.open_connection(host, int(port))
        writers.extend((writer, onward_writer))
        pumps.extend(asyncio.create_task(pump(*ends)) for ends in ((reader, onward_writer), (onward_reader, writer)))

    def cut() -> None:
        for writer in writers:
            writer.transport.abort()

    cable = await asyncio.start_server(connect, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{cable.sockets[0].getsockname()[1]}", cut
    finally:
        cut()
        cable.close()
        await asyncio.gather(*pumps, return_exceptions=True)


def as_dict(metadata: Any) -> dict[str, Any]:
    """Returns metadata as a dictionary, which `dict` makes of it only with newer versions of grpcio."""
    return dict(tuple(metadata or ()))


async def until(condition: Callable[[], bool | Awaitable[bool]], what: str, within: float = 60.0) -> None:
    """Returns when the condition holds; fails where it does not within so many seconds."""
    try:
        async with asyncio.timeout(within):
            while True:
                holds = condition()
                if holds if isinstance(holds, bool) else await holds:
                    return
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise AssertionError(f"not within {within} s: {what}") from None


async def drained(call: Any) -> None:
    """Reads the call to its end."""
    if isinstance(call, grpc.aio.UnaryUnaryCall):
        await call
    else:
        async for _ in call:
            pass
