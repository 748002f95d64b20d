"""Health follows whether calls to a class on Modal can be made, not whether Modal says how busy it is."""

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.health import RUNNERS
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpclib import Status

from tests.modal_cloud import ModalCloud, scripted
from tests.serving import Target, serving, until
from tests.statuses import STATUSES

APP = "healthy"
SERVING = health_pb2.HealthCheckResponse.SERVING
LOOK_UP = ("ClassGet", "FunctionGet", "FunctionBindParams")
EVERY_STATUS = [status for status in Status if status is not Status.OK]
INTERVAL = 0.05


@pytest.fixture(scope="module")
def deployed(cloud: ModalCloud) -> ModalCloud:
    scripted.deploy(cloud, APP)
    return cloud


@pytest.fixture(autouse=True)
def quick(cloud: ModalCloud, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("flywheel_server.engines.modal.reachability.CONFIRMATION_SECONDS", 0.5)
    monkeypatch.setattr("flywheel_server.engines.modal.remote_class.STATS_TIMEOUT", 0.3)
    monkeypatch.setattr("flywheel_server.engines.modal.remote_class.PROBE_TIMEOUT", 2.0)
    yield
    cloud.calm()


async def is_serving(target: Target, name: str = "") -> bool:
    found = await health_pb2_grpc.HealthStub(target.channel).Check(health_pb2.HealthCheckRequest(service=name))
    return bool(found.status == SERVING)


def is_not_serving(target: Target) -> Callable[[], Any]:
    async def holds() -> bool:
        return not await is_serving(target)

    return holds


async def stays_serving(target: Target, seconds: float) -> None:
    watch = health_pb2_grpc.HealthStub(target.channel).Watch(health_pb2.HealthCheckRequest())
    statuses: list[int] = []

    async def read() -> None:
        async for response in watch:
            statuses.append(response.status)  # noqa: PERF401 - it is read until it is cancelled

    reading = asyncio.ensure_future(read())
    await until(lambda: bool(statuses), "the watch begins")
    await asyncio.sleep(seconds)
    watch.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    assert statuses == [SERVING]


@pytest.mark.thorough
async def test_stats_that_modal_does_not_tell_leave_health_as_it_is(deployed: ModalCloud) -> None:
    async with serving(scripted.engine(APP), health_interval=INTERVAL) as target:
        await until(lambda: is_serving(target), "it is serving")
        await target.stub.GenerateAll(pb.GenerationRequest(text="x", max_tokens=1))
        await until(lambda: is_serving(target, RUNNERS), "it has runners")
        for status in EVERY_STATUS:
            fault = deployed.disturb("FunctionGetCurrentStats", status=status)
            await until(lambda: fault.befallen >= 2, "stats were asked for")  # noqa: B023 - it is awaited here
            await stays_serving(target, 0.2)
            fault.end()
        for delay in (1000.0, 1.0):
            fault = deployed.disturb("FunctionGetCurrentStats", delay=delay)
            await until(lambda: fault.befallen >= 2, "stats were asked for")  # noqa: B023 - as above
            await stays_serving(target, 1.0)
            assert await is_serving(target, RUNNERS)
            await target.stub.GenerateAll(pb.GenerationRequest(text="x", max_tokens=1))
            fault.end()


async def test_a_server_that_starts_without_stats_is_serving(deployed: ModalCloud) -> None:
    deployed.limit("FunctionGetCurrentStats")
    async with serving(scripted.engine(APP), health_interval=INTERVAL) as target:
        await until(lambda: is_serving(target), "it is serving")
        await stays_serving(target, 1.0)
        assert not await is_serving(target, RUNNERS)


@pytest.mark.parametrize("status", STATUSES)
async def test_a_class_that_cannot_be_found_for_a_while_is_not_serving(deployed: ModalCloud, status: Status) -> None:
    async with serving(scripted.engine(APP), health_interval=INTERVAL) as target:
        await until(lambda: is_serving(target), "it is serving")
        fault = deployed.disturb("FunctionGetCurrentStats", *LOOK_UP, status=status)
        if status is Status.RESOURCE_EXHAUSTED:
            # Modal can be reached, and has said nothing against the class.
            await stays_serving(target, 1.5)
            return
        await until(is_not_serving(target), "it is not serving")
        fault.end()
        await until(lambda: is_serving(target), "it is serving again")
        # One failed look-up does not make the class unreachable.
        deployed.disturb("FunctionGetCurrentStats", status=status, times=5)
        deployed.disturb("ClassGet", status=status, times=1)
        await stays_serving(target, 0.8)


async def test_a_class_that_is_gone_is_not_serving_until_it_is_deployed_anew(cloud: ModalCloud) -> None:
    scripted.deploy(cloud, "going")
    async with serving(scripted.engine("going"), health_interval=INTERVAL) as target:
        await until(lambda: is_serving(target), "it is serving")
        assert cloud.cli("app", "stop", "going", "--yes").returncode == 0
        await until(is_not_serving(target), "it is not serving")
        scripted.deploy(cloud, "going")
        await until(lambda: is_serving(target), "it is serving again")
        assert (await target.stub.GenerateAll(pb.GenerationRequest(text="x", max_tokens=1))).num_samples == 1


async def test_calls_that_succeed_keep_the_server_healthy(deployed: ModalCloud) -> None:
    async with serving(scripted.engine(APP), health_interval=INTERVAL) as target:
        await until(lambda: is_serving(target), "it is serving")
        deployed.disturb("FunctionGetCurrentStats", *LOOK_UP, status=Status.UNAVAILABLE)

        async def call() -> None:
            while True:
                await target.stub.GenerateAll(pb.GenerationRequest(text="x", max_tokens=1))

        calling = asyncio.ensure_future(call())
        await stays_serving(target, 1.5)
        calling.cancel()
        await asyncio.gather(calling, return_exceptions=True)
