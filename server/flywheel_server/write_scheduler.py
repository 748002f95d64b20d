"""Limits how many streams write a message in each iteration of the event loop, so that new calls do not wait for all of them.

An event loop runs everything that is ready before it looks for new calls, and accepting a call takes several iterations. So
only a few streams write in each iteration. While the loop keeps up, every stream writes at once. While it does not, text
collects in the buffers of the streams that wait, and they write larger messages.
"""

import asyncio
from collections import deque
from typing import Final

WRITES_PER_ITERATION: Final = 3
"""Streams that write in one iteration of the event loop.

Few, because grpc.aio takes five iterations to accept a call, and accepts one call after the other.
"""


class WriteScheduler:
    """Permits streams to write. Streams that have written nothing yet come first, then those that have waited longest.

    One write of each iteration is kept for the stream that has waited longest, so that new streams cannot starve the others.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._new: deque[asyncio.Future[None]] = deque()
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._left = WRITES_PER_ITERATION
        """How many streams may still write in this iteration."""

    def request(self, permission: asyncio.Future[None], *, is_first: bool) -> None:
        """Completes the future when the stream may write: at once if the iteration allows it and no stream waits."""
        if self._left and not self._waiting:
            self._grant(permission)
        elif is_first:
            self._new.append(permission)
        else:
            self._waiting.append(permission)

    def _grant(self, permission: asyncio.Future[None]) -> None:
        if permission.done():
            return  # its call has ended
        if self._left == WRITES_PER_ITERATION:
            self._loop.call_soon(self._next_iteration)
        self._left -= 1
        permission.set_result(None)

    def _next_iteration(self) -> None:
        self._left = WRITES_PER_ITERATION
        self._grant_until(WRITES_PER_ITERATION - 1, self._waiting)
        self._grant_until(0, self._new)
        self._grant_until(0, self._waiting)

    def _grant_until(self, left: int, waiting: deque[asyncio.Future[None]]) -> None:
        while self._left > left and waiting:
            self._grant(waiting.popleft())
