"""Publishes the addresses of an app's gateways to callers: one record for each container, in a `modal.Dict` of the app.

The key is the id of the container's task. The record, which `flywheel_client` reads, is plain data:

    app        the name of the app
    address    HOST:PORT of the tunnel, with TLS
    started    when the container first published the record, in seconds since the epoch
    refreshed  when the container last published the record, in seconds since the epoch
    refreshes  how often the container has published the record

The two times are for people to read. Readers compare no clocks, because the clocks of two machines may differ: a container
still refreshes its record if the record changes from one read to the next.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

import modal
import structlog

from flywheel_server.engines.modal.waits import cancel_and_wait, modal_result

log = structlog.stdlib.get_logger(__name__)

REFRESH_INTERVAL: Final = 20.0
"""Seconds between two refreshes. After each refresh the gateway reads the records of the other gateways."""

MAX_UNCHANGED_READS: Final = 9
"""Reads in a row after which an unchanged record is removed: its container was killed before it could withdraw it.

Reads are counted instead of seconds, because no gateway can refresh its record while Modal cannot be reached.
"""

MAX_RECORDS: Final = 1000
"""Maximum number of records that are read from one Dict."""

ATTEMPT_TIMEOUT: Final = 20.0
"""Seconds that one attempt to refresh the record, to read the other records, or to withdraw the record may take."""

WITHDRAW_TIMEOUT: Final = 28.0
"""Seconds for the withdrawal, while the server stops; see `flywheel_server.deployment.gateway`.

If it takes longer, other gateways remove the record, because it no longer changes.
"""

WITHDRAW_RETRY_INTERVAL: Final = 0.5
"""Seconds between two attempts to withdraw the record."""


def dict_name(app: str) -> str:
    """Returns the name of the `modal.Dict` with the records of an app."""
    return f"{app}-endpoints"


@asynccontextmanager
async def published(app: str, address: str) -> AsyncIterator[None]:
    """Publishes the address for the length of the context, and refreshes it. Raises `modal.exception.Error` or `TimeoutError`.

    On leaving the context, waits until Modal has withdrawn the address, for at most `WITHDRAW_TIMEOUT`.
    """
    record = _Record(app, os.environ["MODAL_TASK_ID"], address)
    try:
        await record.refresh()
    except asyncio.CancelledError:
        await record.withdraw()
        raise
    refreshing = asyncio.create_task(_refresh_regularly(record))
    try:
        yield
    finally:
        await cancel_and_wait(refreshing)
        await record.withdraw()


class _Record:
    """The record of this container, and what this container has read of the others."""

    def __init__(self, app: str, task: str, address: str) -> None:
        self._name = dict_name(app)
        self._task = task
        self._record = {"app": app, "address": address, "started": time.time()}
        self._refreshes = 0
        self._putting: asyncio.Task[None] | None = None
        self._dict = self._open_dict()
        self._others: dict[str, tuple[tuple[str, ...], int]] = {}
        """By container: its progress at the last read, and for how many reads in a row the progress has been unchanged."""

    async def refresh(self) -> None:
        """Publishes the record. If this is cancelled, publishing goes on; `withdraw` waits for its end."""
        self._putting = asyncio.create_task(self._put())
        await asyncio.shield(self._putting)

    async def _put(self) -> None:
        """Stores the record, in a new Dict if the old one was deleted."""
        self._refreshes += 1
        record = {**self._record, "refreshed": time.time(), "refreshes": self._refreshes}
        async with asyncio.timeout(ATTEMPT_TIMEOUT):
            try:
                await modal_result(self._dict.put.aio(self._task, record))
            except modal.exception.NotFoundError:
                self._dict = self._open_dict()
                await modal_result(self._dict.put.aio(self._task, record))

    async def withdraw(self) -> None:
        """Removes the record, and removes it again if a refresh was running, which may have stored it after that."""
        with suppress(TimeoutError):
            async with asyncio.timeout(WITHDRAW_TIMEOUT):
                running = {self._putting} if self._putting and not self._putting.done() else set()
                await self._remove()
                if running:
                    await asyncio.wait(running)
                    await self._remove()

    async def _remove(self) -> None:
        while not await _succeeds("address not withdrawn", self._pop()):  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(WITHDRAW_RETRY_INTERVAL)

    async def _pop(self) -> None:
        with suppress(modal.exception.NotFoundError):
            await modal_result(self._dict.pop.aio(self._task, None))

    async def remove_stale_records(self) -> None:
        """Reads the other records, and removes each that has not changed for `MAX_UNCHANGED_READS`."""
        others = {}
        for task, record in await modal_result(_read_records(self._dict)):
            progress = _progress(record)
            before, unchanged = self._others.get(task, (None, 0))
            others[task] = progress, unchanged + 1 if progress == before else 0
        others.pop(self._task, None)
        self._others = others
        for task, (_, unchanged) in others.items():
            if unchanged >= MAX_UNCHANGED_READS:
                await modal_result(self._dict.pop.aio(task, None))
                log.info("removed the record of a container that has ended", container=task)

    def _open_dict(self) -> modal.Dict:
        return modal.Dict.from_name(self._name, create_if_missing=True)


async def _refresh_regularly(record: _Record) -> None:
    while True:
        await asyncio.sleep(REFRESH_INTERVAL)
        if await _succeeds("address not refreshed", record.refresh()):
            await _succeeds("other addresses not looked at", record.remove_stale_records())


async def _succeeds(failure: str, work: Coroutine[Any, Any, None]) -> bool:
    """Returns whether the work succeeds within `ATTEMPT_TIMEOUT`. Logs a failure, after which the server goes on."""
    try:
        async with asyncio.timeout(ATTEMPT_TIMEOUT):
            await work
    except Exception as error:  # noqa: BLE001 - a later attempt may succeed
        log.warning(failure, error=type(error).__name__)
        return False
    return True


async def _read_records(directory: modal.Dict) -> list[tuple[str, Any]]:
    """Returns the records by task. If one cannot be unpickled, which makes `items` fail, each is read by itself, or is None."""
    try:
        found = [item async for item in directory.items.aio()]
    except modal.exception.DeserializationError:
        tasks = [task async for task in directory.keys.aio()]
        found = [(task, await _read_record(directory, task)) for task in tasks[:MAX_RECORDS]]
    return [(task, record) for task, record in found[:MAX_RECORDS] if isinstance(task, str)]


async def _read_record(directory: modal.Dict, task: str) -> Any:  # noqa: ANN401 - a record may be anything
    with suppress(modal.exception.DeserializationError):
        return await modal_result(directory.get.aio(task))
    return None


def _progress(record: Any) -> tuple[str, ...]:  # noqa: ANN401 - as above
    """Returns the fields of a record that change with each refresh."""
    known = record if type(record) is dict else {}
    values = (known.get("refreshed"), known.get("refreshes"))
    return tuple(str(value) for value in values if isinstance(value, int | float))
