"""Long silent calls survive the limits that servers set for pings. All times are a 200th of the real times."""

from __future__ import annotations

import asyncio
from concurrent import futures
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import grpc
import pytest
from flywheel_client import AsyncClient, DeadlineExceededError, UnavailableError
from flywheel_client._channel import KEEPALIVE_TIME_SECONDS
from flywheel_proto.v1 import generation_pb2_grpc
from flywheel_server.engines.scripted import Script, ScriptedEngine

from tests.client.conftest import FakeService
from tests.serving import serving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

DEFAULT_ENFORCEMENT = 300
"""Seconds that servers want between two pings unless they are told otherwise (gRFC A8)."""

MILLISECONDS = 1000 // 200
SILENCE = 6.0


@asynccontextmanager
async def pinging(address: str, seconds: int) -> AsyncIterator[AsyncClient]:
    options = [("grpc.keepalive_time_ms", seconds * MILLISECONDS)]
    async with AsyncClient(address, channel_options=options, retry=None) as client:
        yield client


async def a_call_to_a_server_that_enforces_the_default(keepalive_time: int, outcome: type[Exception], match: str) -> None:
    options = [
        ("grpc.http2.min_ping_interval_without_data_ms", DEFAULT_ENFORCEMENT * MILLISECONDS),
        # One less than by default, so that a third ping that is too early ends the connection.
        ("grpc.http2.max_ping_strikes", 1),
    ]
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=4), options=options)
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(FakeService(hangs=True), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        async with pinging(address, keepalive_time) as client:
            with pytest.raises(outcome, match=match):
                await client.generate_all("p", max_tokens=1, timeout=SILENCE)
    finally:
        await asyncio.to_thread(server.stop(None).wait)


async def a_call_to_our_server() -> None:
    slow = ScriptedEngine(Script(prompt_delay=SILENCE))
    # To this server, each ping of the client is too early, so only the pings of the server keep the connection alive.
    async with (
        serving(slow, keepalive_time=1.0, min_ping_interval=60.0) as target,
        pinging(target.address, 270) as client,
    ):
        assert (await client.generate_all("p", max_tokens=1)).num_samples == 1


@pytest.mark.thorough
async def test_long_silent_calls_survive() -> None:
    await asyncio.gather(
        a_call_to_a_server_that_enforces_the_default(KEEPALIVE_TIME_SECONDS, DeadlineExceededError, "deadline"),
        a_call_to_a_server_that_enforces_the_default(200, UnavailableError, "Too many pings"),
        a_call_to_our_server(),
    )
