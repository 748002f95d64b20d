"""Hands events from threads over to the event loop. The events of one step of an engine wake the loop once."""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final, TypeVar

T = TypeVar("T")

STEP_WAIT_SECONDS: Final = 0.001
"""Seconds that the first thread waits for the events that the other threads have of the same step."""


class Handover:
    """Calls functions on the event loop, in the order in which threads pass them to `call_soon`.

    After each step, an engine has events of all its streams at about the same time, each in a thread of its own. The loop is
    woken once for all of them: waking it costs more than handling an event, and takes a core from the threads that compute.

    Attributes:
        threads: How many threads have events in each step. If there are several, the first thread waits
            `STEP_WAIT_SECONDS` for the others before it wakes the loop.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.threads = 0
        self._loop = loop
        self._pending: deque[tuple[Callable[[Any], object], Any]] = deque()
        self._is_scheduled = False
        """Whether a thread has woken the loop, or is about to."""

    def call_soon(self, function: Callable[[T], object], argument: T) -> None:
        """Schedules `function(argument)` on the event loop. Any thread may call this. The function must not raise.

        Raises `RuntimeError` if the loop is closed.
        """
        self._pending.append((function, argument))
        if not self._is_scheduled:
            self._is_scheduled = True
            if self.threads > 1:
                time.sleep(STEP_WAIT_SECONDS)
            self._loop.call_soon_threadsafe(self._run_pending)

    def _run_pending(self) -> None:
        # First, so that a thread that appends from here on wakes the loop again.
        self._is_scheduled = False
        while self._pending:
            function, argument = self._pending.popleft()
            function(argument)
