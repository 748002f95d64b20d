"""Waiting for work that cannot be interrupted, such as that of a thread."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")


async def to_its_end(work: asyncio.Future[T], cancel: Callable[[], None] = lambda: None) -> T:
    """Returns the result of the work. Cancelled, it calls `cancel`, and still returns only when the work is over."""
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        cancel()
        while not work.done():
            # A second cancel, as by grpc after our own deadline, must not let go of what the work still holds.
            with suppress(asyncio.CancelledError):
                await asyncio.wait([work])
        # Asyncio complains of an error that nobody looks at.
        if not work.cancelled():
            work.exception()
        raise
