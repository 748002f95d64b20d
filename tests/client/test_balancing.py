"""Calls go in turn to all servers of a target that are healthy, and may wait for one."""

from __future__ import annotations

import asyncio
import json
from contextlib import ExitStack
from typing import TYPE_CHECKING

import grpc
import grpc.aio
import pytest
from flywheel_client import SERVICE_CONFIG, Retry, UnavailableError
from flywheel_proto.v1 import generation_pb2, generation_pb2_grpc
from grpc_health.v1 import health_pb2

from tests.client.conftest import SERVICE, WAIT, serving_fake, unavailable, watchable
from tests.serving import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from grpc_health.v1.health import HealthServicer

    from tests.client.conftest import Caller, FakeService

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
def healths() -> list[HealthServicer]:
    """The health services of `healthy`."""
    return [watchable(), watchable()]


@pytest.fixture
def healthy(healths: list[HealthServicer]) -> Iterator[list[FakeService]]:
    """Two servers that are healthy."""
    with ExitStack() as stack:
        for health in healths:
            health.set(SERVICE, SERVING)
        yield [stack.enter_context(serving_fake(health)) for health in healths]


def target_of(fakes: list[FakeService]) -> str:
    return "ipv4:" + ",".join(fake.address for fake in fakes)


def counts(fakes: list[FakeService]) -> list[int]:
    return [len(fake.requests) for fake in fakes]


async def calls_reach(one: Caller, fakes: list[FakeService]) -> None:
    """Makes calls until all these servers have seen one: channels connect to one server after another."""

    async def reached() -> bool:
        await one.call()
        return all(counts(fakes))

    await until(reached, "all servers get calls")


async def test_calls_go_to_the_servers_in_turn(caller: Callable[..., Caller], healthy: list[FakeService]) -> None:
    one = caller(target_of(healthy))
    await calls_reach(one, healthy)
    before = counts(healthy)
    for _ in range(4):
        await one.call()
        assert await one.next(await one.stream()) == "ab"
    assert [after - earlier for after, earlier in zip(counts(healthy), before, strict=True)] == [4, 4]


async def test_a_server_gets_calls_only_while_it_is_serving(
    caller: Callable[..., Caller], healthy: list[FakeService], healths: list[HealthServicer]
) -> None:
    one = caller(target_of(healthy), retry=None)
    await calls_reach(one, healthy)
    healths[0].set(SERVICE, NOT_SERVING)

    async def settled() -> bool:
        before = len(healthy[0].requests)
        for _ in range(4):
            await one.call()
        return len(healthy[0].requests) == before

    await until(settled, "calls go to the other server alone")
    before = len(healthy[0].requests)
    for _ in range(10):
        await one.call()
    assert len(healthy[0].requests) == before
    healths[0].set(SERVICE, SERVING)

    async def returned() -> bool:
        await one.call()
        return len(healthy[0].requests) > before

    await until(returned, "the server gets calls again")


async def test_a_server_that_is_not_serving_still_answers_questions(
    caller: Callable[..., Caller], fake: FakeService, health: HealthServicer
) -> None:
    one = caller(fake.address, retry=None)
    assert await one.call() == "p"
    health.set(SERVICE, NOT_SERVING)
    client = one.client

    async def refused() -> bool:
        try:
            await one.call()
        except UnavailableError:
            return True
        return False

    await until(refused, "generations fail")
    status: str = await one.ask(client.health, SERVICE)
    assert status == "NOT_SERVING"
    assert (await one.ask(client.model)).engine == "fake"
    assert (await one.ask(client.stats)).backlog == 3
    assert len(fake.peers) == 1, "all of it went over one connection"


async def test_a_server_without_health_is_taken_as_healthy(caller: Callable[..., Caller], fakes: list[FakeService]) -> None:
    one = caller(target_of(fakes), retry=None)
    await calls_reach(one, fakes)


@pytest.mark.parametrize("per_call", [False, True])
async def test_a_call_may_wait_until_the_server_is_serving(
    caller: Callable[..., Caller], fake: FakeService, health: HealthServicer, per_call: bool
) -> None:
    health.set(SERVICE, NOT_SERVING)
    one = caller(fake.address, retry=None, wait_for_ready=not per_call)
    options = {"wait_for_ready": True} if per_call else {}
    call = asyncio.create_task(one.call(timeout=WAIT, **options))
    stream = asyncio.create_task(one.next(await one.stream(timeout=WAIT, **options)))
    with pytest.raises(UnavailableError):
        await one.call(wait_for_ready=False)
    assert not call.done()
    health.set(SERVICE, SERVING)
    assert (await call, await stream) == ("p", "ab")


async def test_a_call_may_wait_for_a_server_that_starts_later(caller: Callable[..., Caller], free_port: int) -> None:
    one = caller(f"127.0.0.1:{free_port}", retry=None, wait_for_ready=True)
    call = asyncio.create_task(one.call(timeout=WAIT))
    health = asyncio.create_task(one.ask(one.client.stats, timeout=WAIT))
    with pytest.raises(UnavailableError):
        await one.call(wait_for_ready=False)
    with serving_fake(port=free_port):
        assert await call == "p"
        assert (await health).active == 2
        await one.close()


async def test_a_client_moves_to_the_other_server_when_one_stops(
    caller: Callable[..., Caller], healthy: list[FakeService]
) -> None:
    one = caller(target_of(healthy), retry=Retry(initial_backoff=0.01))
    await calls_reach(one, healthy)
    healthy[0].stop()
    for _ in range(6):
        assert await one.call() == "p"
    assert len(healthy[1].requests) >= 6


def test_stubs_of_your_own_try_again_by_the_service_config(fake: FakeService) -> None:
    unavailable(fake)
    fake.recovers_after = 2
    with grpc.insecure_channel(fake.address, [("grpc.service_config", SERVICE_CONFIG)]) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        assert stub.GenerateAll(generation_pb2.GenerationRequest(text="p")).prompt == "p"
    assert len(fake.requests) == 3


async def test_stubs_of_your_own_wait_as_long_as_the_server_asks_for(healthy: list[FakeService]) -> None:
    one = healthy[0]
    unavailable(one)
    assert one.failure is not None
    one.failure = (*one.failure[:2], (("grpc-retry-pushback-ms", "700"),))  # type: ignore[assignment]
    one.recovers_after = 1
    async with grpc.aio.insecure_channel(one.address, [("grpc.service_config", SERVICE_CONFIG)]) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        assert [delta.text async for delta in stub.GenerateDeltas(generation_pb2.GenerationRequest(text="p"))] == ["ab", "c"]
    first, second = one.arrivals
    assert second - first >= 0.7


def test_the_service_config_names_the_service() -> None:
    config = json.loads(SERVICE_CONFIG)
    assert config["healthCheckConfig"] == {"serviceName": SERVICE}
    assert config["methodConfig"][0]["name"] == [{"service": SERVICE}]
