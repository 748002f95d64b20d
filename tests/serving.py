"""Servers for tests: the real one, in process, on a free port of the loopback interface."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
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
    configured = Settings(address="127.0.0.1:0", **{"drain_timeout": 0, **settings})
    async with serve(engine, configured) as port, connected(f"127.0.0.1:{port}") as target:
        yield target


async def until(condition: Callable[[], bool | Awaitable[bool]], what: str, within: float = 20.0) -> None:
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
