"""How to wait for Modal's client, whose `.aio` methods may swallow a cancellation.

Such a method runs on an event loop of Modal's own, in another thread. If the task that awaits it is cancelled just when the
method fails, the method may raise its own error instead of CancelledError. The cancellation, which comes from the caller or its
deadline, is then lost, and a loop of retries goes on. So no code here awaits such a method directly.
"""

import asyncio
from collections.abc import AsyncIterable, Awaitable
from typing import Any, Generic, TypeVar

from modal import exception

T = TypeVar("T")


async def modal_result(work: Awaitable[T]) -> T:
    """Returns or raises what the work does. Raises CancelledError if, and only if, the awaiting task is cancelled.

    CancelledError is raised at once. The work is then cancelled in the background; Modal may have carried it out.
    """
    running = asyncio.ensure_future(_Outcome.of(work))
    try:
        await asyncio.wait({running})
    except asyncio.CancelledError:
        _cancel_in_background(running)
        raise
    if running.cancelled():
        raise exception.ClientClosed("Modal's client gave up the work")
    return running.result().unwrap()


async def modal_items(items: AsyncIterable[T]) -> list[T]:
    """Returns all items of an iterator of Modal's client. Cancellation works as in `modal_result`."""

    async def collect() -> list[T]:
        return [item async for item in items]

    return await modal_result(collect())


class _Outcome(Generic[T]):
    """The result or the error of some work. If a task raised an error such as SystemExit, that would end the event loop."""

    def __init__(self, result: list[T], error: BaseException | None) -> None:
        self._result = result
        self._error = error

    @classmethod
    async def of(cls, work: Awaitable[T]) -> "_Outcome[T]":
        try:
            return cls([await work], None)
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # noqa: BLE001 - `unwrap` raises it
            return cls([], error)

    def unwrap(self) -> T:
        if self._error is not None:
            raise self._error
        return self._result[0]


_cancelled: set[asyncio.Future[Any]] = set()
"""Keeps the tasks alive until they end: the event loop has only weak references to them."""


def _cancel_in_background(running: asyncio.Future[Any]) -> None:
    running.cancel()
    _cancelled.add(running)
    running.add_done_callback(_cancelled.discard)
