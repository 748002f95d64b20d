"""Hands what threads make to the event loop, all that one step of an engine makes at a time."""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final, TypeVar

T = TypeVar("T")

STEP_SPREAD: Final = 0.001
"""Seconds within which the threads of an engine give what they have of one step."""


class Handover:
    """Calls functions on the event loop, in the order in which threads gave them.

    An engine that works in steps gives the events of all its streams at about the same time, each on a thread of its own. The
    loop is woken once for all of them, because that costs more than an event does, and takes a core from the threads that
    compute. A function must not raise.

    Attributes:
        threads: How many threads give something in each step. If there are several, the first waits a moment for the others.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.threads = 0
        self._loop = loop
        self._given: deque[tuple[Callable[[Any], object], Any]] = deque()
        self._is_coming = False
        """Whether the loop is going to look."""

    def give(self, function: Callable[[T], object], argument: T) -> None:
        """Have the function called on the event loop. For any thread; raises `RuntimeError` if the loop is closed."""
        self._given.append((function, argument))
        if not self._is_coming:
            self._is_coming = True
            if self.threads > 1:
                time.sleep(STEP_SPREAD)
            self._loop.call_soon_threadsafe(self._take)

    def _take(self) -> None:
        # In this order: what a thread gives from now on, it says to the loop again.
        self._is_coming = False
        while self._given:
            function, argument = self._given.popleft()
            function(argument)
