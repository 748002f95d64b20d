"""How to wait for Modal's client, whose `.aio` methods may swallow a cancellation.

Such a method runs on an event loop of Modal's own, in another thread. If the task that awaits it is cancelled just when the
work there fails, the method may raise the error of the work instead of CancelledError. Then the caller's cancel, or its
deadline, is lost, and a loop that tries again goes on. So nothing here awaits such a method directly.
"""

import asyncio
from collections.abc import AsyncIterable, Awaitable
from typing import Any, Generic, TypeVar

from modal import exception

T = TypeVar("T")


async def modal_result(work: Awaitable[T]) -> T:
    """Returns or raises what the work does. Raises CancelledError if, and only if, the awaiting task is cancelled.

    The CancelledError comes at once. The work is cancelled then too, but ends in the background: Modal may have done it.
    """
    running = asyncio.ensure_future(_Outcome.of(work))
    try:
        await asyncio.wait({running})
    except asyncio.CancelledError:
        _abandon(running)
        raise
    if running.cancelled():
        raise exception.ClientClosed("Modal's client gave up the work")
    return running.result().unwrap()


async def modal_items(items: AsyncIterable[T]) -> list[T]:
    """Returns all items of an iterator of Modal's, which is waited for as by `modal_result`."""

    async def collect() -> list[T]:
        return [item async for item in items]

    return await modal_result(collect())


class _Outcome(Generic[T]):
    """What came of some work, also if it raised a SystemExit, with which a task would end the event loop."""

    def __init__(self, result: list[T], error: BaseException | None) -> None:
        self._result = result
        self._error = error

    @classmethod
    async def of(cls, work: Awaitable[T]) -> "_Outcome[T]":
        try:
            return cls([await work], None)
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # noqa: BLE001 - it is raised where it is waited for
            return cls([], error)

    def unwrap(self) -> T:
        if self._error is not None:
            raise self._error
        return self._result[0]


_abandoned: set[asyncio.Future[Any]] = set()
"""The event loop keeps no reference to its tasks."""


def _abandon(running: asyncio.Future[Any]) -> None:
    running.cancel()
    _abandoned.add(running)
    running.add_done_callback(_abandoned.discard)
