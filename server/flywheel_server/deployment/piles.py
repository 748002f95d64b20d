"""Fewer requests for a sender that is behind: what came while it sent goes out together."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TypeVar

T = TypeVar("T")


async def in_piles(events: AsyncIterator[T]) -> AsyncGenerator[list[T], None]:
    """Yields all events that have come since it yielded last, at least one; raises what `events` raises after them."""
    pile: list[T] = []
    more = asyncio.Event()

    async def collect() -> None:
        async for event in events:
            pile.append(event)
            more.set()

    collecting = asyncio.create_task(collect())
    collecting.add_done_callback(lambda _: more.set())
    try:
        while pile or not collecting.done():
            await more.wait()
            more.clear()
            if pile:
                taken = pile.copy()
                pile.clear()
                yield taken
        await collecting
    finally:
        collecting.cancel()
        await asyncio.gather(collecting, return_exceptions=True)
