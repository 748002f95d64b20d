"""What an engine can hold at a time, given out first come, first served."""

import asyncio


class Capacity:
    """Slots and tokens of context that concurrent generations share; `waiting` counts those in the queue."""

    def __init__(self, slots: int, tokens: int) -> None:
        self.waiting = 0
        self._slots = slots
        self._tokens = tokens
        self._turn = asyncio.Lock()
        self._given_back = asyncio.Event()

    def reserve(self, slots: int, tokens: int) -> "Reservation":
        """Waits until so many slots and tokens are free, and holds them for the length of the context.

        Cancelling the wait leaves the queue.
        """
        return Reservation(self, slots, tokens)

    async def take(self, slots: int, tokens: int) -> None:
        """Waits until so many slots and tokens are free, and takes them."""
        if self.waiting or not self._has(slots, tokens):
            await self._wait_for(slots, tokens)
        self._slots -= slots
        self._tokens -= tokens

    def give_back(self, slots: int, tokens: int) -> None:
        """Gives back what was taken."""
        self._slots += slots
        self._tokens += tokens
        self._given_back.set()

    def _has(self, slots: int, tokens: int) -> bool:
        return self._slots >= slots and self._tokens >= tokens

    async def _wait_for(self, slots: int, tokens: int) -> None:
        self.waiting += 1
        try:
            # asyncio.Lock wakes its waiters in order, so nobody overtakes the one who waits for much.
            async with self._turn:
                while not self._has(slots, tokens):
                    self._given_back.clear()
                    await self._given_back.wait()
        finally:
            self.waiting -= 1


class Reservation:
    """A share of a capacity, for the length of the context."""

    def __init__(self, capacity: Capacity, slots: int, tokens: int) -> None:
        self._capacity = capacity
        self._slots = slots
        self._tokens = tokens

    async def __aenter__(self) -> None:
        await self._capacity.take(self._slots, self._tokens)

    async def __aexit__(self, *_: object) -> None:
        self._capacity.give_back(self._slots, self._tokens)
