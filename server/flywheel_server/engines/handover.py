"""Hands what threads make to the event loop, all that there is at a time: waking the loop costs more than an event does."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Handover(Generic[T]):
    """Calls functions on the event loop, in the order in which threads gave them.

    The threads of an engine that works in steps give their events at about the same time, and wake the loop once for all of
    them. A function must not raise.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._given: deque[tuple[Callable[[T], object], T]] = deque()
        self._is_coming = False
        """Whether the loop is going to look."""

    def give(self, function: Callable[[T], object], argument: T) -> None:
        """Have the function called on the event loop. For any thread; raises `RuntimeError` if the loop is closed."""
        self._given.append((function, argument))
        if not self._is_coming:
            self._is_coming = True
            self._loop.call_soon_threadsafe(self._take)

    def _take(self) -> None:
        # In this order: what a thread gives from now on, it says to the loop again.
        self._is_coming = False
        while self._given:
            function, argument = self._given.popleft()
            function(argument)
