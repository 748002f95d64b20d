"""A call that ends early releases what it holds in the engine: in the queue, while the prompt is read, and in decoding."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.engines.llama_cpp.engine import EmbeddedEngine
from flywheel_server.engines.scripted import Script, ScriptedEngine

from tests.engines.llama_cpp.conftest import SLOTS, Work
from tests.serving import Target, connected, drained, serving, through_a_cable, until
from tests.thorough import further

METHODS = ["Generate", "GenerateDeltas", "GenerateAll"]
STORY = "<|im_start|>user\nWrite a very long story about a llama.<|im_end|>\n<|im_start|>assistant\n"
# More than 200 steps of reading.
LONG_PROMPT = pb.GenerationRequest(text="word " * 3500, max_tokens=1)
# Greedy, because the model then repeats itself and ends at max_tokens; a sampled story may end at any time.
ENDLESS = pb.GenerationRequest(text=STORY, max_tokens=900, num_samples=SLOTS, temperature=0)
# Leaves slots free, but too little of the context for another call.
LARGE = pb.GenerationRequest(text=STORY, max_tokens=3500, temperature=0)

Ending = Callable[[Target, str, pb.GenerationRequest, Callable[[], Awaitable[None]]], Awaitable[None]]


async def cancelled(target: Target, method: str, request: pb.GenerationRequest, reached: Callable[[], Awaitable[None]]) -> None:
    """Calls, and cancels the call at the point that `reached` waits for."""
    call = getattr(target.stub, method)(request)
    reading = asyncio.ensure_future(drained(call))
    await reached()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading


async def disconnected(
    target: Target, method: str, request: pb.GenerationRequest, reached: Callable[[], Awaitable[None]]
) -> None:
    """Calls, and breaks the connection at the point that `reached` waits for."""
    async with through_a_cable(target.address) as cable, connected(cable.address) as other:
        reading = asyncio.ensure_future(drained(getattr(other.stub, method)(request)))
        await reached()
        cable.cut()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await reading
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def expired(target: Target, method: str, request: pb.GenerationRequest, reached: Callable[[], Awaitable[None]]) -> None:
    """Calls with a deadline that is over some time after the point that `reached` waits for."""
    is_quick = (await target.stub.GetModel(pb.GetModelRequest())).engine == "scripted"
    deadline = asyncio.ensure_future(drained(getattr(target.stub, method)(request, timeout=0.5 if is_quick else 2.5)))
    await reached()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await deadline
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def stats(target: Target) -> tuple[int, int, int]:
    now = await target.stub.GetStats(pb.GetStatsRequest())
    return now.active, now.queued, now.backlog


async def becomes_idle(engine: EmbeddedEngine) -> None:
    """Waits until llama.cpp is idle, and asserts that it computes only a few steps before that, however slow the steps are.

    These are the current step, the next step if it begins before llama.cpp sees the cancel, and the steps that run while the
    cancel is on its way from the caller.
    """
    before = Work.of(engine).steps
    await until(lambda: Work.of(engine).busy_slots == 0, "llama.cpp is idle")
    assert Work.of(engine).steps - before <= 5


@pytest.mark.parametrize("method", ["GenerateDeltas", *further(METHODS, but=["GenerateDeltas"])])
@pytest.mark.parametrize("ending", [cancelled, disconnected, expired])
class TestEmbedded:
    async def test_while_it_decodes(
        self, embedded: EmbeddedEngine, embedded_target: Target, method: str, ending: Ending
    ) -> None:
        async def decoding() -> None:
            await until(lambda: Work.of(embedded).busy_slots == SLOTS, "all samples decode")

        await ending(embedded_target, method, ENDLESS, decoding)
        await becomes_idle(embedded)
        assert await stats(embedded_target) == (0, 0, 0)

    async def test_while_it_reads_the_prompt(
        self, embedded: EmbeddedEngine, embedded_target: Target, method: str, ending: Ending
    ) -> None:
        async def reading() -> None:
            await until(lambda: Work.of(embedded).busy_slots == 1, "llama.cpp reads the prompt")

        await ending(embedded_target, method, LONG_PROMPT, reading)
        await becomes_idle(embedded)
        assert await stats(embedded_target) == (0, 0, 0)

    async def test_while_it_waits(self, embedded: EmbeddedEngine, embedded_target: Target, method: str, ending: Ending) -> None:
        first = embedded_target.stub.GenerateAll(LARGE)
        await until(lambda: Work.of(embedded).busy_slots == 1, "the context is taken")

        async def waiting() -> None:
            async def queued() -> bool:
                return await stats(embedded_target) == (1, 1, 0)

            await until(queued, "the call waits")

        await ending(embedded_target, method, pb.GenerationRequest(text="x", max_tokens=900), waiting)

        async def left() -> bool:
            return await stats(embedded_target) == (1, 0, 0)

        await until(left, "the call has left the queue")
        assert Work.of(embedded).busy_slots > 0, "the other call goes on"
        first.cancel()
        await becomes_idle(embedded)


SCRIPTS = {
    "queue": Script(slots=1, hang_after=0),
    "prompt": Script(prompt_delay=60),
    "before the first token": Script(hang_after=0),
    "between tokens": Script(hang_after=5),
    "while tokens come": Script(token_delay=0.001),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ending", [cancelled, disconnected, expired])
@pytest.mark.parametrize("where", SCRIPTS)
async def test_scripted(where: str, ending: Any, method: str) -> None:
    engine = ScriptedEngine(SCRIPTS[where])
    request = pb.GenerationRequest(text="x", max_tokens=4000, num_samples=2)
    async with serving(engine) as target:
        before = 0
        if where == "queue":
            first = target.stub.GenerateAll(request)
            await until(lambda: engine.running == 1, "the slot is taken")
            before = 1

        async def reached() -> None:
            async def arrived() -> bool:
                return sum((await stats(target))[:2]) == before + 1

            await until(arrived, "the call has arrived")

        await ending(target, method, request, reached)

        async def only_the_first() -> bool:
            return await stats(target) == (before, 0, 0) and engine.running == before

        await until(only_the_first, "the call is gone")
        if before:
            first.cancel()
            await until(lambda: engine.running == 0, "the other call is gone")
