"""Tells callers where the gateways are: one record for each container in a `modal.Dict`.

The key is the id of the container's task. The record, which `flywheel_client` reads, is plain data:

    app        the name of the app
    address    host:port of the tunnel, which is TLS
    started    when the container published it first, in seconds since the epoch
    refreshed  when it did so last; a record that was not refreshed for 90 s is stale
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import modal
import structlog

log = structlog.stdlib.get_logger(__name__)

DICT: Final = "flywheel-grpc-endpoints"

REFRESH_INTERVAL: Final = 20.0
"""Seconds between two refreshes: a few may fail before the record goes stale."""

FORGOTTEN_AFTER: Final = 3600.0
"""Seconds without a refresh after which a record is removed: its container was killed before it could withdraw it."""

WITHDRAW_TIMEOUT: Final = 2.0
"""Seconds for the withdrawal, which must not eat up the time that running calls have to finish."""


@asynccontextmanager
async def published(app: str, address: str) -> AsyncIterator[None]:
    """Publishes the address for the length of the context, and keeps it fresh; raises `modal.exception.Error`."""
    directory = modal.Dict.from_name(DICT, create_if_missing=True)
    task = os.environ["MODAL_TASK_ID"]
    record = {"app": app, "address": address, "started": time.time()}
    await _put(directory, task, record)
    refreshing = asyncio.create_task(_keep_fresh(directory, task, record))
    try:
        yield
    finally:
        refreshing.cancel()
        await asyncio.gather(refreshing, return_exceptions=True)
        async with _tolerant("address not withdrawn", WITHDRAW_TIMEOUT):
            await directory.pop.aio(task)


async def _keep_fresh(directory: modal.Dict, task: str, record: dict[str, Any]) -> None:
    async with _tolerant("old addresses not removed", REFRESH_INTERVAL):
        await _forget_the_dead(directory)
    while True:
        await asyncio.sleep(REFRESH_INTERVAL)
        async with _tolerant("address not refreshed", REFRESH_INTERVAL):
            await _put(directory, task, record)


@asynccontextmanager
async def _tolerant(failure: str, timeout: float) -> AsyncIterator[None]:  # noqa: ASYNC109 - of the work in the context
    """Logs what goes wrong: whatever it is, the next try may work, and the server goes on meanwhile."""
    try:
        async with asyncio.timeout(timeout):
            yield
    except Exception as error:  # noqa: BLE001
        log.warning(failure, error=type(error).__name__)


async def _put(directory: modal.Dict, task: str, record: dict[str, Any]) -> None:
    await directory.put.aio(task, {**record, "refreshed": time.time()})


async def _forget_the_dead(directory: modal.Dict) -> None:
    limit = time.time() - FORGOTTEN_AFTER
    dead = [task async for task, record in directory.items.aio() if record.get("refreshed", 0.0) < limit]
    for task in dead:
        await directory.pop.aio(task)
