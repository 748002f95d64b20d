"""Servers for tests: the real one, in process, on a free port of the loopback interface."""

import asyncio
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from flywheel_proto.v1 import generation_pb2, generation_pb2_grpc
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
async def connected(address: str, *options: tuple[str, int]) -> AsyncIterator[Target]:
    """Gives a channel to the address, with its stub."""
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        yield Target(address, channel, generation_pb2_grpc.GenerationServiceStub(channel))


@asynccontextmanager
async def serving(engine: Engine, **settings: Any) -> AsyncIterator[Target]:
    """Serves the engine, and stops without a drain."""
    configured = Settings(address="127.0.0.1:0", **{"withdraw_window": 0, "drain_timeout": 0, **settings})
    async with serve(engine, configured) as port, connected(f"127.0.0.1:{port}") as target:
        yield target


class Cable:
    """What runs between a client and a server."""

    def __init__(self, onward: str, delay: float) -> None:
        self.address = ""
        """Leads to the server."""
        self._delay = delay
        self._onward = onward
        self._whole = asyncio.Event()
        self._whole.set()
        self._closed = False
        self._writers: list[asyncio.StreamWriter] = []
        self._pumps: list[asyncio.Task[None]] = []

    def cut(self) -> None:
        """Resets every connection."""
        for writer in self._writers:
            writer.transport.abort()

    def unplug(self) -> None:
        """Carries nothing any more, and neither end can tell."""
        self._whole.clear()

    async def connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Takes in a connection."""
        self._writers.append(writer)
        host, _, port = self._onward.rpartition(":")
        try:
            onward_reader, onward_writer = await asyncio.open_connection(host, int(port))
        except ConnectionRefusedError:
            writer.transport.abort()
            return
        self._writers.append(onward_writer)
        if self._closed:  # while this connection was made
            self.cut()
            return
        ends = ((reader, onward_writer), (onward_reader, writer))
        self._pumps.extend(asyncio.create_task(self._pump(*each)) for each in ends)

    async def close(self) -> None:
        """Ends everything."""
        self._closed = True
        self.cut()
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(2**16):
                await self._whole.wait()
                await asyncio.sleep(self._delay)
                writer.write(data)
                await writer.drain()


@asynccontextmanager
async def through_a_cable(address: str, delay: float = 0) -> AsyncIterator[Cable]:
    """Gives a cable to the address, on which everything takes so many seconds to arrive."""
    cable = Cable(address, delay)
    listening = await asyncio.start_server(cable.connect, "127.0.0.1", 0)
    cable.address = f"127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    try:
        yield cable
    finally:
        listening.close()
        await cable.close()


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


async def code_of(call: Any) -> grpc.StatusCode:
    """Reads the call to its end, and returns its status."""
    try:
        await drained(call)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def last_of(call: Any) -> generation_pb2.GenerationDelta:
    """Reads the call to its end, as it was begun: by `read`. Returns the last delta."""
    last = generation_pb2.GenerationDelta()
    while isinstance(delta := await call.read(), generation_pb2.GenerationDelta):
        last = delta
    return last


async def settled() -> None:
    """Lets the event loop do whatever it can do without waiting."""
    for _ in range(10):
        await asyncio.sleep(0)


def free_ports(count: int) -> list[int]:
    """Returns ports of the loopback interface where nothing listens, each a different one.

    They are below the ports that systems choose for port 0 and for connections, so no other test takes one of them.
    """
    ports: list[int] = []
    while len(ports) < count:
        port = random.randrange(10_000, 32_768)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            ports.append(port)
    return ports
