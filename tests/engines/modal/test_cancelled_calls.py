"""Calls that nobody waits for any more end on Modal too."""

import asyncio

import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.engines.scripted import Script

from tests.modal_cloud import ModalCloud, scripted
from tests.modal_cloud.cancelling import cancel_at_random, short_looks
from tests.serving import Target, connected, drained, serving, through_a_cable, until

METHODS = ["Generate", "GenerateDeltas", "GenerateAll"]
APP = "cancelled"
REQUEST = pb.GenerationRequest(text="hello", max_tokens=2000)


@pytest.fixture(scope="module")
def slow(cloud: ModalCloud) -> ModalCloud:
    scripted.deploy(cloud, APP, Script(token_delay=0.01))
    return cloud


async def none_running() -> bool:
    return await scripted.running(APP) == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", ["cancel", "deadline", "cut"])
@pytest.mark.parametrize("class_name", ["Model", "Flywheel"])
async def test_whoever_goes_away_takes_the_call_along(slow: ModalCloud, class_name: str, how: str, method: str) -> None:
    async with serving(scripted.engine(APP, class_name)) as direct, through_a_cable(direct.address) as cable:
        before = len(slow.calls)
        async with connected(cable.address) as target:
            call = getattr(target.stub, method)(REQUEST, timeout=1 if how == "deadline" else None)
            reading = asyncio.create_task(drained(call))
            await until(lambda: any(made.state == "running" for made in slow.calls[before:]), "the call runs", within=20)
            if how == "cancel":
                call.cancel()
            if how == "cut":
                cable.cut()
            await asyncio.gather(reading, return_exceptions=True)
        (made,) = slow.calls[before:]
        await until(lambda: made.id in slow.cancelled, "the cancel has reached Modal")
        await until(lambda: made.state == "cancelled", "the call has ended on Modal")
        await until(lambda: idle(direct), "the server is idle")
    await until(none_running, "the class works on nothing")


async def idle(target: Target) -> bool:
    stats = await target.stub.GetStats(pb.GetStatsRequest())
    return (stats.active, stats.queued) == (0, 0)


async def test_nothing_is_left_of_calls_cancelled_at_random(slow: ModalCloud) -> None:
    """`python -m tests.modal_cloud.cancelling` does the same with 10,000 calls, on busy cores."""
    async with serving(scripted.engine(APP)) as target:
        await target.stub.GetStats(pb.GetStatsRequest())
        with short_looks():
            left = await cancel_at_random(target, slow, APP, 300)
    assert left.nothing, left
