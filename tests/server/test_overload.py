"""A server with more calls than it works on: which calls wait, and which are refused with a retry delay."""

import asyncio
from contextlib import AsyncExitStack
from dataclasses import replace

import grpc
import grpc.aio
import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.engines.base import EngineModel
from flywheel_server.engines.scripted import Script, ScriptedEngine
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.server.test_errors import METHODS, details_of, details_of_a_deadline
from tests.serving import Target, drained, serving, until

ONE = pb.GenerationRequest(text="x", max_tokens=1)


async def full(target: Target, engine: ScriptedEngine, calls: int) -> AsyncExitStack:
    """Fills the server with calls that hang."""
    stack = AsyncExitStack()
    for _ in range(calls):
        call = target.stub.GenerateAll(pb.GenerationRequest(text="x", max_tokens=9))
        stack.callback(call.cancel)
    await until(lambda: engine.running == calls, "the server is full")
    return stack


@pytest.mark.parametrize("method", METHODS)
async def test_a_full_server_refuses_calls_with_a_retry_delay(method: str) -> None:
    engine = ScriptedEngine(Script(hang_after=1))
    async with serving(engine, max_concurrent=2, max_queued=0) as target, await full(target, engine, 2):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await drained(getattr(target.stub, method)(ONE))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        details = details_of(caught.value)
        assert details[ErrorInfo].reason == "OVERLOADED"
        assert details[RetryInfo].retry_delay.ToMilliseconds() > 0


async def test_calls_that_do_not_generate_never_queue() -> None:
    engine = ScriptedEngine(Script(hang_after=1))
    async with serving(engine, max_concurrent=1, max_queued=1) as target, await full(target, engine, 1):
        waiting = target.stub.GenerateAll(ONE)
        health = health_pb2_grpc.HealthStub(target.channel)

        async def queued() -> bool:
            return bool((await target.stub.GetStats(pb.GetStatsRequest())).queued == 1)

        await until(queued, "one waits")
        assert (await target.stub.GetModel(pb.GetModelRequest())).name
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING
        assert not waiting.done()


@pytest.mark.parametrize("method", METHODS)
async def test_a_waiting_call_is_admitted_unless_it_is_cancelled(method: str) -> None:
    engine = ScriptedEngine(Script(hang_after=5))
    async with serving(engine, max_concurrent=1, max_queued=2) as target:
        holding = await full(target, engine, 1)
        leaving = target.stub.GenerateAll(ONE)
        staying = asyncio.ensure_future(drained(getattr(target.stub, method)(ONE)))

        async def queued(number: int) -> bool:
            return bool((await target.stub.GetStats(pb.GetStatsRequest())).queued == number)

        await until(lambda: queued(2), "both wait")
        leaving.cancel()
        await until(lambda: queued(1), "one has left")
        await holding.aclose()
        await staying


async def test_a_deadline_bounds_the_wait() -> None:
    engine = ScriptedEngine(Script(hang_after=1))
    async with serving(engine, max_concurrent=1) as target, await full(target, engine, 1):
        details = await details_of_a_deadline(lambda: target.stub.GenerateAll(ONE, timeout=0.3))
        assert details[ErrorInfo].reason == "IN_QUEUE"


async def test_an_engine_with_few_slots_has_the_queue_of_the_server() -> None:
    class NarrowEngine(ScriptedEngine):
        def model(self) -> EngineModel:
            return replace(super().model(), slots=1)

    engine = NarrowEngine(Script(hang_after=1))
    async with serving(engine, max_queued=0) as target, await full(target, engine, 1):
        assert await target.stub.GenerateAll(ONE).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
