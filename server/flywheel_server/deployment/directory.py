"""Tells callers where the gateways of an app are: one record for each container, in a `modal.Dict` of the app.

The key is the id of the container's task. The record, which `flywheel_client` reads, is plain data:

    app        the name of the app
    address    host:port of the tunnel, which is TLS
    started    when the container published it first, in seconds since the epoch
    refreshed  when the container did so last
    refreshes  how often it has done so

The two times are for people to read. Whether a container still refreshes its record is judged by whether the record changes
from one reading to the next, because the clocks of two machines may differ.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

import modal
import structlog

from flywheel_server.engines.modal.waits import modal_result

log = structlog.stdlib.get_logger(__name__)

REFRESH_INTERVAL: Final = 20.0
"""Seconds between two refreshes, after each of which the gateway looks at the records of the others."""

MAX_UNCHANGED_LOOKS: Final = 9
"""Looks in a row that find another record unchanged before it is removed: its container was killed before it could withdraw it.

Looks are counted rather than seconds, because nobody can refresh a record while Modal cannot be reached.
"""

MAX_RECORDS: Final = 1000
"""Records of one Dict that are looked at."""

TRY_TIMEOUT: Final = 20.0
"""Seconds that one try to refresh the record, to look at the others, or to withdraw it may take."""

WITHDRAW_TIMEOUT: Final = 28.0
"""Seconds for the withdrawal, beside which all else goes on: see `flywheel_server.deployment.gateway`.

After that, the record is left to the other gateways, which find it unchanged.
"""

WITHDRAW_INTERVAL: Final = 0.5
"""Seconds between two tries to withdraw."""


def dict_name(app: str) -> str:
    """Returns the name of the `modal.Dict` with the records of an app."""
    return f"{app}-endpoints"


@asynccontextmanager
async def published(app: str, address: str) -> AsyncIterator[None]:
    """Publishes the address for the length of the context, and keeps it fresh; raises `modal.exception.Error` or TimeoutError.

    Leaving the context takes as long as Modal does to withdraw the address, up to `WITHDRAW_TIMEOUT`.
    """
    record = _Record(app, os.environ["MODAL_TASK_ID"], address)
    try:
        await record.refresh()
    except asyncio.CancelledError:
        await _withdraw(record)
        raise
    refreshing = asyncio.create_task(_keep_fresh(record))
    try:
        yield
    finally:
        refreshing.cancel()
        await asyncio.gather(refreshing, return_exceptions=True)
        await _withdraw(record)


class _Record:
    """The record of this container, and those of the others beside it."""

    def __init__(self, app: str, task: str, address: str) -> None:
        self._name = dict_name(app)
        self._task = task
        self._record = {"app": app, "address": address, "started": time.time()}
        self._refreshes = 0
        self._putting: asyncio.Task[None] | None = None
        self._dict = self._found_or_made()
        self._others: dict[str, tuple[tuple[str, ...], int]] = {}
        """How far each of the others was at the last look, and how many looks in a row have found it no further."""

    async def refresh(self) -> None:
        """Publishes the record anew. Cancelling it does not end that: `refreshed` waits for it."""
        self._putting = asyncio.create_task(self._put())
        await asyncio.shield(self._putting)

    @property
    def is_refreshing(self) -> bool:
        """Whether the record is being published anew."""
        return self._putting is not None and not self._putting.done()

    async def refreshed(self) -> None:
        """Returns when the record is not being published anew."""
        if self._putting is not None:
            await asyncio.wait({self._putting})

    async def _put(self) -> None:
        """Stores the record, in a new Dict if the old one was deleted."""
        self._refreshes += 1
        record = {**self._record, "refreshed": time.time(), "refreshes": self._refreshes}
        async with asyncio.timeout(TRY_TIMEOUT):
            try:
                await modal_result(self._dict.put.aio(self._task, record))
            except modal.exception.NotFoundError:
                self._dict = self._found_or_made()
                await modal_result(self._dict.put.aio(self._task, record))

    async def withdraw(self) -> None:
        """Removes the record, if it is still there."""
        with suppress(modal.exception.NotFoundError):
            await modal_result(self._dict.pop.aio(self._task, None))

    async def forget_the_dead(self) -> None:
        """Looks at the other records, and removes those that have not changed for many looks."""
        others = {}
        for task, record in await modal_result(_records(self._dict)):
            progress = _progress(record)
            before, looks = self._others.get(task, (None, 0))
            others[task] = progress, looks + 1 if progress == before else 0
        others.pop(self._task, None)
        self._others = others
        for task, (_, looks) in others.items():
            if looks >= MAX_UNCHANGED_LOOKS:
                await modal_result(self._dict.pop.aio(task, None))
                log.info("removed the record of a container that has ended", container=task)

    def _found_or_made(self) -> modal.Dict:
        return modal.Dict.from_name(self._name, create_if_missing=True)


async def _keep_fresh(record: _Record) -> None:
    while True:
        await asyncio.sleep(REFRESH_INTERVAL)
        if await _succeeds("address not refreshed", record.refresh()):
            await _succeeds("other addresses not looked at", record.forget_the_dead())


async def _withdraw(record: _Record) -> None:
    """Withdraws the record at once, and again if a refresh was on its way, which may have come after that."""
    with suppress(TimeoutError):
        async with asyncio.timeout(WITHDRAW_TIMEOUT):
            was_refreshing = record.is_refreshing
            await _withdraw_once(record)
            if was_refreshing:
                await record.refreshed()
                await _withdraw_once(record)


async def _withdraw_once(record: _Record) -> None:
    while not await _succeeds("address not withdrawn", record.withdraw()):  # noqa: ASYNC110 - nothing tells when
        await asyncio.sleep(WITHDRAW_INTERVAL)


async def _succeeds(failure: str, work: Coroutine[Any, Any, None]) -> bool:
    """Returns whether the work ends well in time, and logs what went wrong: the next try may work, and the server goes on."""
    try:
        async with asyncio.timeout(TRY_TIMEOUT):
            await work
    except Exception as error:  # noqa: BLE001 - whatever it is
        log.warning(failure, error=type(error).__name__)
        return False
    return True


async def _records(directory: modal.Dict) -> list[tuple[str, Any]]:
    """Returns the records by task; one that cannot be read is None. It would end `items`, so then each is read by itself."""
    try:
        found = [item async for item in directory.items.aio()]
    except modal.exception.DeserializationError:
        tasks = [task async for task in directory.keys.aio()]
        found = [(task, await _get(directory, task)) for task in tasks[:MAX_RECORDS]]
    return [(task, record) for task, record in found[:MAX_RECORDS] if isinstance(task, str)]


async def _get(directory: modal.Dict, task: str) -> Any:  # noqa: ANN401 - anything can be stored
    with suppress(modal.exception.DeserializationError):
        return await modal_result(directory.get.aio(task))
    return None


def _progress(record: Any) -> tuple[str, ...]:  # noqa: ANN401 - as above
    """Returns what changes with each refresh."""
    known = record if type(record) is dict else {}
    values = (known.get("refreshed"), known.get("refreshes"))
    return tuple(str(value) for value in values if isinstance(value, int | float))
