"""A gateway's record in the real `modal.Dict`: published, refreshed, withdrawn, and removed after its container has died."""

import asyncio
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import modal
import pytest
from flywheel_server.deployment import directory
from flywheel_server.deployment.directory import MAX_UNCHANGED_READS, dict_name, published
from grpclib import Status
from grpclib.exceptions import StreamTerminatedError

from tests.modal_cloud import ModalCloud
from tests.serving import until
from tests.statuses import STATUSES
from tests.thorough import further

TASK = "ta-test"
APP = "some-app"
NAME = f"{APP}-endpoints"
UNREADABLE = b"no pickle"


@pytest.fixture(autouse=True)
async def in_a_container(cloud: ModalCloud, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    monkeypatch.setenv("MODAL_TASK_ID", TASK)
    monkeypatch.setattr(directory, "REFRESH_INTERVAL", 0.1)
    yield
    cloud.calm()
    await modal.Dict.objects.delete.aio(NAME, allow_missing=True)


def records() -> modal.Dict:
    """Returns another handle, as another process has one."""
    return modal.Dict.from_name(NAME, create_if_missing=True)


async def record() -> dict[str, Any] | None:
    found: dict[str, Any] | None = await records().get.aio(TASK)
    return found


async def refreshed_after(count: int) -> bool:
    found = await record()
    return found is not None and found["refreshes"] > count


async def test_published_kept_fresh_and_withdrawn() -> None:
    async with published(APP, "localhost:1234"):
        first = await record()
        assert first is not None
        assert (first["app"], first["address"]) == (APP, "localhost:1234")
        assert abs(first["started"] - time.time()) < 10
        await until(lambda: refreshed_after(first["refreshes"]), "it is refreshed")
        later = await record()
        assert later is not None
        assert later["started"] == first["started"]
        assert later["refreshed"] > first["refreshed"]
    assert await record() is None


@pytest.mark.parametrize("offset", [-3600.0, 0.0, 3600.0, None])
async def test_the_record_changes_by_any_clock(offset: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even by a clock that stands still."""
    right = time.time
    monkeypatch.setattr(time, "time", (lambda: 1.0) if offset is None else (lambda: right() + offset))
    async with published(APP, "localhost:1234"):
        await until(lambda: refreshed_after(2), "it is refreshed")


def test_each_app_has_a_dict_of_its_own() -> None:
    assert dict_name("flywheel-grpc") == "flywheel-grpc-endpoints"
    assert dict_name("other") == "other-endpoints"


async def test_deleting_the_dict_of_one_app_leaves_that_of_another() -> None:
    async with published(APP, "localhost:1234"), published("another-app", "localhost:1235"):
        await modal.Dict.objects.delete.aio("another-app-endpoints")
        await until(lambda: refreshed_after(2), "it is refreshed")
    await modal.Dict.objects.delete.aio("another-app-endpoints", allow_missing=True)


async def test_a_dict_that_was_deleted_is_made_again(cloud: ModalCloud) -> None:
    async with published(APP, "localhost:1234"):
        for _ in range(2):
            await modal.Dict.objects.delete.aio(NAME)
            await until(lambda: refreshed_after(0), "it is published again")
        await modal.Dict.objects.delete.aio(NAME)
    # Deleting, publishing again and withdrawing may come in any order.
    assert await record() is None


@pytest.mark.parametrize("rpc", ["DictUpdate", *further(["DictGetOrCreate", "DictContents", "DictPop"])])
@pytest.mark.parametrize("status", STATUSES)
async def test_no_status_of_any_rpc_ends_the_refreshing(cloud: ModalCloud, rpc: str, status: Status) -> None:
    known = records()
    await known.put.aio("ta-dead", {"refreshed": 1.0})
    async with published(APP, "localhost:1234"):
        fault = cloud.disturb(rpc, status=status, times=2)
        if rpc == "DictGetOrCreate":
            # Not through an RPC: for that, the client would first request the Dict.
            cloud._storage.dicts.delete(known.object_id)
        await until(lambda: fault.befallen > 0, "it fails")
        cloud.calm()
        before = await record()
        await until(lambda: refreshed_after(before["refreshes"] if before else 0), "it is refreshed again")
    assert await record() is None


async def test_no_error_of_the_transport_ends_the_refreshing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modal's client does not translate these errors."""
    errors: list[Exception] = [StreamTerminatedError("gone"), TimeoutError(), RuntimeError("a bug")]
    refresh = directory._Record.refresh

    async def failing(self: Any) -> None:
        if errors:
            raise errors.pop()
        await refresh(self)

    async with published(APP, "localhost:1234"):
        monkeypatch.setattr(directory._Record, "refresh", failing)
        await until(lambda: not errors, "it has failed in all ways")
        before = await record()
        assert before is not None
        await until(lambda: refreshed_after(before["refreshes"]), "it is refreshed again")


async def test_a_withdrawal_is_tried_until_modal_lets_it(cloud: ModalCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "WITHDRAW_RETRY_INTERVAL", 0.05)
    async with published(APP, "localhost:1234"):
        refused = cloud.disturb("DictPop", status=Status.RESOURCE_EXHAUSTED, times=3)
        slow = cloud.disturb("DictPop", delay=0.5, times=1)
    assert await record() is None
    assert (refused.befallen, slow.befallen) == (3, 1)


async def test_a_withdrawal_ends_although_modal_does_not_let_it(cloud: ModalCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "WITHDRAW_TIMEOUT", 0.5)
    async with published(APP, "localhost:1234"):
        cloud.disturb("DictPop", status=Status.RESOURCE_EXHAUSTED)
    cloud.calm()
    assert await record() is not None


async def test_cancelling_at_any_moment_ends_the_refreshing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "REFRESH_INTERVAL", 0.002)

    async def publish(entered: asyncio.Event) -> None:
        async with published(APP, "localhost:1234"):
            entered.set()
            await asyncio.sleep(60)

    for number in range(20):
        entered = asyncio.Event()
        publishing = asyncio.create_task(publish(entered))
        await entered.wait()
        await asyncio.sleep(number / 2000)
        publishing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await publishing
        assert not [task for task in asyncio.all_tasks() if "_refresh_regularly" in repr(task)]
        assert await record() is None


@pytest.mark.parametrize("refreshes", [1, 2])
async def test_a_refresh_that_comes_late_leaves_nothing(monkeypatch: pytest.MonkeyPatch, refreshes: int) -> None:
    """Modal may carry out a put that its client has given up after the withdrawal. Even the first put."""
    found_or_made = directory._Record._open_dict
    landed = 0
    background: list[asyncio.Future[None]] = []
    late = asyncio.Event()

    def with_late_puts(self: Any) -> Any:
        real = found_or_made(self)

        async def put(task: str, value: Any) -> None:
            async def land() -> None:
                nonlocal landed
                if value["refreshes"] == refreshes:
                    late.set()
                    await asyncio.sleep(0.3)
                await real.put.aio(task, value)
                landed += 1

            background.append(asyncio.ensure_future(land()))
            await asyncio.shield(background[-1])

        return SimpleNamespace(put=SimpleNamespace(aio=put), pop=real.pop, items=real.items)

    monkeypatch.setattr(directory._Record, "_open_dict", with_late_puts)

    async def publish() -> None:
        async with published(APP, "localhost:1234"):
            await asyncio.Event().wait()

    publishing = asyncio.create_task(publish())
    await late.wait()
    publishing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await publishing
    await asyncio.gather(*background)
    assert landed == refreshes
    assert await record() is None


async def test_records_of_dead_containers_are_removed_and_all_others_kept() -> None:
    """Whatever their clocks say, and also among values that cannot be read."""
    others = records()
    dead = {
        "ta-killed": {"app": APP, "address": "x:1", "started": 0.0, "refreshed": time.time(), "refreshes": 7},
        "ta-ahead": {"app": APP, "address": "x:1", "started": 0.0, "refreshed": time.time() + 3600, "refreshes": 7},
        "ta-older": {"app": APP, "address": "x:1", "started": 0.0, "refreshed": time.time()},
    }
    living = {"ta-behind": {"refreshed": 5.0, "refreshes": 0}, "ta-older-behind": {"refreshed": 5.0}}
    for task, value in (dead | living).items():
        await others.put.aio(task, value)
    async with published(APP, "localhost:1234"):
        gone: set[str] = set()

        async def dead_are_gone() -> bool:
            for value in living.values():
                value["refreshed"] += 1.0
            await others.update.aio(living)
            gone.update({task for task in dead if not await others.contains.aio(task)})
            return gone == dead.keys()

        await until(dead_are_gone, "the dead are removed")
        for task in living:
            assert await others.contains.aio(task)
        assert await others.contains.aio(TASK)


@pytest.mark.parametrize("first", ["key", "value"])
async def test_an_unreadable_record_does_not_keep_records_of_dead_containers(cloud: ModalCloud, first: str) -> None:
    await cloud_put(cloud, **{first: UNREADABLE})
    await records().put.aio("ta-killed", {"refreshed": 1.0})
    async with published(APP, "localhost:1234"):
        before = cloud.rpcs["DictContents"]
        await until(lambda: cloud.rpcs["DictContents"] > before + 2, "it looks")
        await until(lambda: refreshed_after(MAX_UNCHANGED_READS + 3), "it goes on")
        if first == "value":
            assert not await records().contains.aio("ta-killed")


async def test_no_record_is_removed_while_no_container_can_refresh_its_record(cloud: ModalCloud) -> None:
    await records().put.aio("ta-other", {"refreshed": 1.0})
    async with published(APP, "localhost:1234"):
        await until(lambda: refreshed_after(2), "it looks")
        cloud.disturb("DictUpdate", status=Status.RESOURCE_EXHAUSTED)
        tried = cloud.rpcs["DictUpdate"]
        await until(lambda: cloud.rpcs["DictUpdate"] > tried + MAX_UNCHANGED_READS + 3, "it cannot refresh")
        cloud.calm()
        before = await record()
        assert before is not None
        await until(lambda: refreshed_after(before["refreshes"]), "it is refreshed again")
        assert await records().contains.aio("ta-other")


async def cloud_put(cloud: ModalCloud, key: bytes | None = None, value: bytes | None = None) -> None:
    """Stores bytes that are no pickle."""
    from modal._serialization import serialize

    handle = records()
    await handle.hydrate.aio()
    cloud._storage.dicts[handle.object_id][key or serialize("ta-garbage")] = value or serialize("text")
