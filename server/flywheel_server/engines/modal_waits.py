"""How to wait for Modal's client, whose `.aio` methods may swallow a cancellation.

Such a method runs on an event loop of Modal's own, in another thread. If the task that awaits it is cancelled just when the work
there ends, the method may raise the error of the work, or return, instead of raising CancelledError: the caller's cancel, or its
deadline, is lost, and a loop around the method goes on. So nothing of this project awaits one directly.
"""

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

T = TypeVar("T")

_abandoned: set[asyncio.Future[Any]] = set()


async def modal_result(work: Awaitable[T]) -> T:
    """Returns or raises what the work does, or raises CancelledError if the task is cancelled, in every case and at once.

    The work is cancelled then, and ends in the background: what it did until then, it has done.
    """
    running = asyncio.ensure_future(work)
    try:
        await asyncio.wait({running})
    except asyncio.CancelledError:
        _abandon(running)
        raise
    return running.result()


def _abandon(running: asyncio.Future[Any]) -> None:
    running.cancel()
    _abandoned.add(running)  # the event loop keeps no reference of its own
    running.add_done_callback(_ended)


def _ended(running: asyncio.Future[Any]) -> None:
    _abandoned.discard(running)
    if not running.cancelled():
        running.exception()  # which nobody waits for
