"""Many calls that arrive at the same moment: admission decides about each, and not gRPC."""

import asyncio
from collections import Counter
from contextlib import AsyncExitStack
from typing import Any

import grpc.aio
import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_proto.v1 import generation_pb2_grpc
from flywheel_server.engines.scripted import Script, ScriptedEngine
from google.rpc.error_details_pb2 import ErrorInfo

from tests.server.test_errors import METHODS, details_of
from tests.serving import as_dict, drained, serving
from tests.thorough import further

REQUEST = pb.GenerationRequest(text="x", max_tokens=2)


async def outcome(call: Any) -> str:
    """Returns how the call ended: OK, or the reason in the details of its error."""
    try:
        await drained(call)
    except grpc.aio.AioRpcError as error:
        if "grpc-status-details-bin" not in as_dict(error.trailing_metadata()):
            return f"{error.code().name} without details"
        return str(details_of(error)[ErrorInfo].reason)
    return "OK"


async def burst(address: str, method: str, calls: int, connections: int = 4) -> Counter[str]:
    """Makes so many calls at once, over so many connections; returns how they ended."""
    async with AsyncExitStack() as stack:
        options = [("grpc.use_local_subchannel_pool", 1)]
        channels = [grpc.aio.insecure_channel(address, options=options) for _ in range(connections)]
        stubs: list[Any] = []
        for channel in channels:
            await stack.enter_async_context(channel)
            await channel.channel_ready()
            stubs.append(generation_pb2_grpc.GenerationServiceStub(channel))
        begun = [getattr(stubs[number % connections], method)(REQUEST) for number in range(calls)]
        return Counter(await asyncio.gather(*map(outcome, begun)))


@pytest.mark.parametrize("method", [METHODS[0], *further(METHODS[1:])])
async def test_of_3000_calls_at_once_each_is_served_or_refused_with_details(method: str) -> None:
    async with serving(ScriptedEngine(Script(token_delay=0.02)), max_concurrent=100, max_queued=100) as target:
        outcomes = await burst(target.address, method, 3000)
    assert outcomes.keys() <= {"OK", "OVERLOADED"}
    assert outcomes["OK"] >= 200


async def test_2000_streams_at_once_are_all_served_if_the_limits_allow_it() -> None:
    async with serving(ScriptedEngine(Script(token_delay=0.02)), max_concurrent=2000) as target:
        assert await burst(target.address, "GenerateDeltas", 2000) == {"OK": 2000}


@pytest.mark.parametrize("max_streams", [100, *further([1024])])
async def test_calls_over_one_connection_wait_in_the_client_and_are_all_served(max_streams: int) -> None:
    async with serving(ScriptedEngine(), max_concurrent=2000, max_streams=max_streams) as target:
        assert await burst(target.address, "GenerateAll", 2000, connections=1) == {"OK": 2000}
