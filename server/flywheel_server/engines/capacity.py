"""The slots and the context of an engine, which requests acquire in the order in which they come (FIFO)."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Capacity:
    """Slots and tokens of context that concurrent generations share.

    Attributes:
        waiting: How many requests wait in the queue.
    """

    def __init__(self, slots: int, tokens: int) -> None:
        self.waiting = 0
        self._free_slots = slots
        self._free_tokens = tokens
        self._queue = asyncio.Lock()
        self._released = asyncio.Event()

    @asynccontextmanager
    async def reserve(self, slots: int, tokens: int) -> AsyncIterator[None]:
        """Waits until that many slots and tokens are free, and holds them until the context ends.

        If the waiting task is cancelled, its request leaves the queue.
        """
        if self.waiting or not self._has(slots, tokens):
            self.waiting += 1
            try:
                # asyncio.Lock wakes its waiters in order, so a small request never overtakes a large one.
                async with self._queue:
                    while not self._has(slots, tokens):
                        self._released.clear()
                        await self._released.wait()
            finally:
                self.waiting -= 1
        self._free_slots -= slots
        self._free_tokens -= tokens
        try:
            yield
        finally:
            self._free_slots += slots
            self._free_tokens += tokens
            self._released.set()

    def _has(self, slots: int, tokens: int) -> bool:
        return self._free_slots >= slots and self._free_tokens >= tokens
