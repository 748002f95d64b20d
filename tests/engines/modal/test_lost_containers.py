"""The flywheel engine when Modal loses a container: the call is run again, or ends with UNAVAILABLE once it has sent text."""

import asyncio
from typing import Any

import grpc
import grpc.aio
import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.engines.scripted import Script
from google.rpc.error_details_pb2 import RetryInfo

from tests.modal_cloud import Container, ModalCloud, scripted
from tests.modal_cloud.state import Call
from tests.server.test_errors import details_of
from tests.serving import drained, serving, until
from tests.thorough import further

METHODS = ["Generate", "GenerateDeltas", "GenerateAll"]
SLOW = "slow-to-lose"


@pytest.fixture(scope="module")
def slow(cloud: ModalCloud) -> ModalCloud:
    scripted.deploy(cloud, SLOW, Script(token_delay=0.01))
    return cloud


def request(**fields: Any) -> pb.GenerationRequest:
    return pb.GenerationRequest(**{"text": "hello", "max_tokens": 12, **fields})


def nothing_runs(cloud: ModalCloud) -> bool:
    return all(call.state not in {"pending", "running"} for call in cloud.calls)


async def some_running() -> bool:
    return await scripted.running(SLOW) > 0


async def none_running() -> bool:
    return await scripted.running(SLOW) == 0


def container_of(call: Call) -> Container:
    assert call.container is not None
    return call.container


@pytest.mark.parametrize("method", [METHODS[1], *further(METHODS, but=METHODS[1:2])])
async def test_a_container_that_modal_gives_up_is_unavailable(slow: ModalCloud, method: str) -> None:
    slow.reschedules_inputs = False
    try:
        async with serving(scripted.engine(SLOW)) as target:
            before = len(slow.calls)
            call = getattr(target.stub, method)(request(max_tokens=3000))
            reading = asyncio.create_task(drained(call))
            await until(lambda: any(made.state == "running" for made in slow.calls[before:]), "the call runs")
            container_of(slow.calls[before]).kill()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await reading
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert RetryInfo in details_of(caught.value)
    finally:
        slow.reschedules_inputs = True


@pytest.mark.parametrize("method", [METHODS[1], *further(METHODS, but=METHODS[1:2])])
async def test_a_container_that_is_preempted_is_unavailable(slow: ModalCloud, method: str) -> None:
    async with serving(scripted.engine(SLOW)) as target:
        await until(none_running, "no call of another test runs in the class")
        before = len(slow.calls)
        reading = asyncio.create_task(drained(getattr(target.stub, method)(request(max_tokens=3000))))
        await until(lambda: any(made.state == "running" for made in slow.calls[before:]), "the call runs")
        await until(some_running, "the class works on it")
        container_of(slow.calls[before]).interrupt()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await reading
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert RetryInfo in details_of(caught.value)
        assert (await target.stub.GenerateAll(request())).num_samples == 1


@pytest.mark.parametrize("class_name", ["Model", *further(["Flywheel"])])
async def test_a_container_that_is_killed_before_it_sent_text_is_replaced(cloud: ModalCloud, class_name: str) -> None:
    scripted.deploy(cloud, "late", Script(prompt_delay=0.3))
    async with serving(scripted.engine("late", class_name)) as target:
        before = len(cloud.calls)
        call = target.stub.GenerateAll(request(num_samples=2))
        await until(lambda: any(made.state == "running" for made in cloud.calls[before:]), "the call runs")
        container_of(cloud.calls[before]).kill()
        assert len((await call).responses) == 2


async def test_a_container_that_is_killed_after_it_sent_text_ends_the_call(slow: ModalCloud) -> None:
    async with serving(scripted.engine(SLOW)) as target:
        stream = target.stub.GenerateDeltas(request(max_tokens=3000))
        messages = aiter(stream)
        await anext(messages)
        container_of(slow.calls[-1]).kill()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await drained(messages)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert RetryInfo in details_of(caught.value)
        await until(lambda: nothing_runs(slow), "the second attempt is cancelled")
        assert (await target.stub.GenerateAll(request())).num_samples == 1
