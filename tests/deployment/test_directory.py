"""The address of a gateway in the real `modal.Dict`: there in time, kept fresh, withdrawn, and cleared of the dead."""

import time
from typing import Any

import modal
import pytest
from flywheel_server.deployment import directory
from flywheel_server.deployment.directory import DICT, published
from grpclib import Status
from grpclib.exceptions import StreamTerminatedError

from tests.modal_cloud import ModalCloud
from tests.serving import until

TASK = "ta-test"


@pytest.fixture(autouse=True)
async def in_a_container(cloud: ModalCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODAL_TASK_ID", TASK)
    monkeypatch.setattr(directory, "REFRESH_INTERVAL", 0.2)  # and the time that a request has


async def record() -> dict[str, Any] | None:
    found: dict[str, Any] | None = await modal.Dict.from_name(DICT, create_if_missing=True).get.aio(TASK)
    return found


async def refreshed_after(moment: float) -> bool:
    found = await record()
    return found is not None and found["refreshed"] > moment


async def test_published_kept_fresh_and_withdrawn() -> None:
    async with published("some-app", "localhost:1234"):
        first = await record()
        assert first is not None
        assert (first["app"], first["address"]) == ("some-app", "localhost:1234")
        assert abs(first["started"] - time.time()) < 10
        await until(lambda: refreshed_after(first["refreshed"]), "it is refreshed")
        later = await record()
        assert later is not None
        assert later["started"] == first["started"]
    assert await record() is None


async def test_a_control_plane_that_is_away_for_a_while_makes_it_stale_not_gone(cloud: ModalCloud) -> None:
    async with published("some-app", "localhost:1234"):
        cloud.disturb("DictUpdate", status=Status.UNAVAILABLE)
        await until(lambda: cloud.rpcs["DictUpdate"] > 3, "it has tried")
        cloud.calm()
        moment = time.time()
        await until(lambda: refreshed_after(moment), "it is refreshed again")


async def test_no_error_of_any_kind_ends_the_refreshing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modal's client lets those of its transport through."""
    errors: list[Exception] = [StreamTerminatedError("gone"), TimeoutError(), RuntimeError("a bug")]
    put = directory._put

    async def failing(*arguments: Any) -> None:
        if errors:
            raise errors.pop()
        await put(*arguments)

    async with published("some-app", "localhost:1234"):
        monkeypatch.setattr(directory, "_put", failing)
        await until(lambda: not errors, "it has failed in all ways")
        moment = time.time()
        await until(lambda: refreshed_after(moment), "it is refreshed again")


async def test_withdrawing_waits_for_nobody(cloud: ModalCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "WITHDRAW_TIMEOUT", 0.1)
    begun = time.monotonic()
    async with published("some-app", "localhost:1234"):
        cloud.disturb(status=Status.UNAVAILABLE)
    cloud.calm()
    assert time.monotonic() - begun < 5
    await modal.Dict.from_name(DICT).pop.aio(TASK)


async def test_the_records_of_the_dead_are_removed(cloud: ModalCloud) -> None:
    known = modal.Dict.from_name(DICT, create_if_missing=True)
    for task, age in (("ta-dead", 2 * directory.FORGOTTEN_AFTER), ("ta-late", 120.0)):
        await known.put.aio(task, {"app": "some-app", "address": "x:1", "started": 0.0, "refreshed": time.time() - age})
    async with published("some-app", "localhost:1234"):

        async def dead_is_gone() -> bool:
            return await known.get.aio("ta-dead") is None

        await until(dead_is_gone, "the dead one is removed")
        assert await known.get.aio("ta-late") is not None
    await known.pop.aio("ta-late")
