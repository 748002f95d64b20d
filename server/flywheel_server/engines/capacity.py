"""What an engine can hold at a time, given out first come, first served."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Capacity:
    """Slots and tokens of context that concurrent generations share; `waiting` counts those in the queue."""

    def __init__(self, slots: int, tokens: int) -> None:
        self.waiting = 0
        self._slots = slots
        self._tokens = tokens
        self._turn = asyncio.Lock()
        self._given_back = asyncio.Event()

    @asynccontextmanager
    async def reserve(self, slots: int, tokens: int) -> AsyncIterator[None]:
        """Waits until so many slots and tokens are free, and holds them. Cancelling the wait leaves the queue."""
        self.waiting += 1
        try:
            # asyncio.Lock wakes its waiters in order, so nobody overtakes the one who waits for much.
            async with self._turn:
                while self._slots < slots or self._tokens < tokens:
                    self._given_back.clear()
                    await self._given_back.wait()
                self._slots -= slots
                self._tokens -= tokens
        finally:
            self.waiting -= 1
        try:
            yield
        finally:
            self._slots += slots
            self._tokens += tokens
            self._given_back.set()
