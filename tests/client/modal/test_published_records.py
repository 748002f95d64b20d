"""Clients of a deployment whose records are lost, garbage, or written by other clocks: what works goes on working."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import modal
import pytest
from flywheel_client import ModalDirectory, UnavailableError, _pool, published_endpoints
from flywheel_client._records import DEFAULT_APP, dict_name
from modal._serialization import serialize

from tests.client.conftest import Caller, serving_fake
from tests.client.modal.records import GARBAGE, record
from tests.serving import until
from tests.statuses import STATUSES
from tests.thorough import further

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from grpclib import Status

    from tests.client.conftest import FakeService
    from tests.modal_cloud import ModalCloud

NAME = dict_name(DEFAULT_APP)
SOON = 3.0
UNREADABLE = b"no pickle"
RPCS = ("DictGetOrCreate", "DictContents", "FunctionGet")


class Explosive:
    """Raises when it is unpickled."""

    def __reduce__(self) -> Any:
        return int, ("no number",)


@pytest.fixture(autouse=True)
async def clean(cloud: ModalCloud, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    monkeypatch.setattr(_pool, "REFRESH_AFTER_SECONDS", 0.0)  # each call reads the records again
    monkeypatch.setattr(_pool, "MIN_READ_INTERVAL_SECONDS", 0.0)
    await modal.Dict.objects.delete.aio(NAME, allow_missing=True)
    yield
    cloud.calm()
    await modal.Dict.objects.delete.aio(NAME, allow_missing=True)


@pytest.fixture
def plaintext(caller: Callable[..., Caller], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Caller]:
    """Makes clients of the deployment whose endpoints speak plaintext."""

    def make(app: str = DEFAULT_APP, **arguments: Any) -> Caller:
        return caller(ModalDirectory(app), **{"timeout": 10.0} | arguments)

    return make


def records(app: str = DEFAULT_APP) -> modal.Dict:
    return modal.Dict.from_name(dict_name(app), create_if_missing=True)


async def publish(*fakes: FakeService) -> None:
    await records().update.aio({f"ta-{number}": record(fake.address) for number, fake in enumerate(fakes)})


async def store(cloud: ModalCloud, key: bytes, value: bytes) -> None:
    """Stores bytes as they are, before all other items, so that they are read first."""
    handle = records()
    await handle.hydrate.aio()
    stored = cloud._storage.dicts[handle.object_id]
    others = dict(stored)
    stored.clear()
    stored.update({key: value, **{other: others[other] for other in others if other != key}})


async def works(one: Caller, fakes: list[FakeService], calls: int = 7) -> None:
    """Makes calls, each of which reads the records again. At the end, the client must know each endpoint."""
    for _ in range(calls):
        begun = time.monotonic()
        assert await one.call() == "p"
        assert time.monotonic() - begun < SOON
        await asyncio.sleep(0.01)
    assert {member.address for member in one.pool._members.values()} >= {fake.address for fake in fakes}


async def settled(cloud: ModalCloud, readings: int = 2) -> None:
    before = cloud.rpcs["DictGetOrCreate"]
    await until(lambda: cloud.rpcs["DictGetOrCreate"] > before + readings, "the records are read again")


@pytest.mark.parametrize("kind", ["emptied", "deleted", "deleted and made again", *further(GARBAGE)])
async def test_a_running_client_keeps_what_works(
    plaintext: Callable[..., Caller], fakes: list[FakeService], cloud: ModalCloud, kind: str
) -> None:
    await publish(*fakes)
    one = plaintext()
    await works(one, fakes, calls=3)
    if kind == "emptied":
        await records().clear.aio()
    elif kind.startswith("deleted"):
        await modal.Dict.objects.delete.aio(NAME)
        if kind == "deleted and made again":
            await records().hydrate.aio()
    else:
        for number in range(3):
            await records().put.aio(f"ta-{number}", GARBAGE[kind])
    await works(one, fakes)
    await publish(*fakes)
    await works(one, fakes)


@pytest.mark.parametrize("kind", ["an unreadable value", "an explosive value", "an unreadable key", "both"])
async def test_what_cannot_be_read_hides_no_other_record(
    plaintext: Callable[..., Caller], fakes: list[FakeService], cloud: ModalCloud, kind: str
) -> None:
    await publish(*fakes)
    running = plaintext()
    await works(running, fakes, calls=3)
    if kind == "an explosive value":
        await store(cloud, serialize("ta-bad"), serialize(Explosive()))
    if kind in {"an unreadable value", "both"}:
        await store(cloud, serialize("ta-bad"), UNREADABLE)
    if kind in {"an unreadable key", "both"}:
        await store(cloud, UNREADABLE, serialize(record(fakes[0].address)))
    await works(running, fakes)
    if kind != "both":
        assert {endpoint.address for endpoint in await published_endpoints()} == {fake.address for fake in fakes}
        await works(plaintext(), fakes)


async def test_its_own_record_cannot_be_read(
    plaintext: Callable[..., Caller], fakes: list[FakeService], cloud: ModalCloud
) -> None:
    await publish(*fakes)
    one = plaintext()
    await works(one, fakes, calls=3)
    for number in range(3):
        await store(cloud, serialize(f"ta-{number}"), UNREADABLE)
    await works(one, fakes)
    with pytest.raises(UnavailableError, match="has no live endpoint"):
        await plaintext().call()


@pytest.mark.parametrize("status", STATUSES)
async def test_no_status_of_any_rpc_takes_away_what_works(
    plaintext: Callable[..., Caller], fakes: list[FakeService], cloud: ModalCloud, status: Status
) -> None:
    await publish(*fakes)
    one = plaintext()
    await works(one, fakes, calls=3)
    for rpc in (*RPCS, ""):
        cloud.disturb(*([rpc] if rpc else []), status=status)
        await works(one, fakes, calls=3)
        cloud.calm()


async def test_a_withdrawn_endpoint_gets_no_more_calls(plaintext: Callable[..., Caller], fakes: list[FakeService]) -> None:
    await publish(*fakes)
    one = plaintext()
    await works(one, fakes, calls=3)
    await records().pop.aio("ta-0")

    async def is_dropped() -> bool:
        await one.call()
        return fakes[0].address not in one.pool._members

    await until(is_dropped, "it is dropped")
    before = len(fakes[0].requests)
    await works(one, fakes[1:])
    assert len(fakes[0].requests) == before


async def test_each_app_has_its_own(plaintext: Callable[..., Caller], fakes: list[FakeService]) -> None:
    await publish(fakes[0])
    await records("other").put.aio("ta-1", record(fakes[1].address, app="other"))
    one, other = plaintext(), plaintext("other")
    await modal.Dict.objects.delete.aio(NAME)
    assert await other.call() == "p"
    with pytest.raises(UnavailableError, match="has no live endpoint"):
        await one.call()
    await modal.Dict.objects.delete.aio("other-endpoints")
    assert [len(fake.requests) for fake in fakes] == [0, 1, 0]


OFFSETS = [-3600.0, -600.0, -100.0, -90.0, 0.0, 90.0, 100.0, 600.0, 3600.0]


@pytest.mark.parametrize("offset", [600.0, *further(OFFSETS, but=[600.0])])
@pytest.mark.parametrize("counts", [True, False])
async def test_clients_and_gateways_with_other_clocks(
    plaintext: Callable[..., Caller], fakes: list[FakeService], monkeypatch: pytest.MonkeyPatch, offset: float, counts: bool
) -> None:
    """Each clock has another offset: of the client, and of each live gateway. The clock of a killed gateway is ahead of all."""
    more = {"refreshes": 7} if counts else {}
    gateways = {f"ta-{number}": record(fake.address, age=OFFSETS[number], **more) for number, fake in enumerate(fakes)}
    await records().update.aio(gateways)
    await records().put.aio("ta-killed", record("127.0.0.1:1", age=-7200.0, **more))
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() + offset)
    one = plaintext(timeout=None)  # grpc itself counts deadlines from the time of day
    await works(one, fakes)
    await until(lambda: not any(it.address[-2:] == ":1" and it.answers for it in one.pool._members.values()), "it is known")
    assert len(await published_endpoints()) == 4


async def test_cancelling_a_reading_at_any_moment(cloud: ModalCloud) -> None:
    """Modal's methods may swallow a cancellation that arrives as they end."""
    await records().put.aio("ta-1", record("127.0.0.1:1"))
    for number in range(100):
        reading = asyncio.create_task(published_endpoints())
        await asyncio.sleep(number / 10_000)
        if reading.done():
            continue
        reading.cancel()
        async with asyncio.timeout(SOON):
            with pytest.raises(asyncio.CancelledError):
                await reading
    await until(lambda: len(asyncio.all_tasks()) == 1, "nothing is left")


async def test_a_gateway_that_comes_later_is_found(plaintext: Callable[..., Caller], fakes: list[FakeService]) -> None:
    await publish(fakes[0])
    one = plaintext()
    await works(one, fakes[:1], calls=2)
    with serving_fake() as late:
        await records().put.aio("ta-late", record(late.address))

        async def used() -> bool:
            await one.call()
            return bool(late.requests)

        await until(used, "it is used")
        await one.close()
