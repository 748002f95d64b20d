"""Tasks around Modal's client, whose `.aio` methods may swallow a cancellation.

Such a method runs on an event loop of Modal's own, in another thread. If the task that awaits it is cancelled just when the
method fails, the method may raise its own error instead of CancelledError. The cancellation, which comes from the caller or its
deadline, is then lost, and a loop of retries goes on. So no code here awaits such a method directly.
"""

import asyncio
import contextvars
from collections.abc import Awaitable, Coroutine
from typing import Any, TypeVar

from modal import exception

T = TypeVar("T")


async def modal_result(work: Awaitable[T]) -> T:
    """Returns or raises what the work does. Raises CancelledError if, and only if, the awaiting task is cancelled.

    CancelledError is raised at once. The work is then cancelled in the background; Modal may have carried it out.
    """
    running = asyncio.ensure_future(_outcome_of(work))
    try:
        await asyncio.wait({running})
    except asyncio.CancelledError:
        _cancel_in_background(running)
        raise
    if running.cancelled():
        raise exception.ClientClosed("Modal's client gave up the work")
    results, error = running.result()
    if error is not None:
        raise error
    return results[0]


async def _outcome_of(work: Awaitable[T]) -> tuple[list[T], BaseException | None]:
    """Returns the only result of the work, or its error. If a task raised SystemExit, that would end the event loop."""
    try:
        return [await work], None
    except asyncio.CancelledError:
        raise
    except BaseException as error:  # noqa: BLE001 - `modal_result` raises it
        return [], error


def start_in_background(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """Starts a task in an empty context, so that its log lines do not have the request id of the call that starts it."""
    return asyncio.create_task(work, context=contextvars.Context())


def retrieve_error(task: asyncio.Future[Any]) -> None:
    """Retrieves the error of a task that has ended, if any: asyncio logs an error that nobody retrieves."""
    if not task.cancelled():
        task.exception()


async def cancel_and_wait(*tasks: asyncio.Task[Any] | None) -> None:
    """Cancels the tasks, and returns when they have ended. Ignores their errors, and each None."""
    running = [task for task in tasks if task is not None]
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)


_cancelled: set[asyncio.Future[Any]] = set()
"""Keeps the tasks alive until they end: the event loop has only weak references to them."""


def _cancel_in_background(running: asyncio.Future[Any]) -> None:
    running.cancel()
    _cancelled.add(running)
    running.add_done_callback(_cancelled.discard)
