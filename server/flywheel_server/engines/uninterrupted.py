"""Waiting for work that asyncio cannot interrupt, such as a function that runs in a thread."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")


async def wait_until_done(work: asyncio.Future[T], on_cancel: Callable[[], None] = lambda: None) -> T:
    """Returns the result of the work, or raises its error.

    If the waiting task is cancelled, this calls `on_cancel`, waits until the work is done, and only then raises
    `CancelledError`.
    """
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        on_cancel()
        while not work.done():
            # grpc may cancel a second time, after our own deadline has. The work still uses its resources then.
            with suppress(asyncio.CancelledError):
                await asyncio.wait([work])
        # Retrieves the error of the work: asyncio logs an error that nobody retrieves.
        if not work.cancelled():
            work.exception()
        raise
