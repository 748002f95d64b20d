"""Which streams write a message: so many in each iteration of the event loop.

An event loop works on all that is ready before it looks for new calls. If many streams write in one iteration, new calls wait
for all of them, several times over. So a few streams write in each iteration, and calls that arrive meanwhile are served in
between. While the loop keeps up, every stream writes at once. While it does not, text piles up in the buffers of the streams
that wait, and leaves them in larger messages.
"""

import asyncio
from collections import deque
from typing import Final

WRITES_PER_ITERATION: Final = 3
"""How many streams write in one iteration of the event loop.

Small, because grpc.aio takes five iterations to accept a call, and accepts one call after the other.
"""


class WriteScheduler:
    """Lets streams write: first those that have written nothing yet, then those that have waited longest.

    One write of each iteration goes to the stream that has waited longest in any case, so that no number of new streams stops
    the others.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._new: deque[asyncio.Future[None]] = deque()
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._left = WRITES_PER_ITERATION
        """How many streams may still write in this iteration."""

    def request(self, permission: asyncio.Future[None], *, is_first: bool) -> None:
        """Sets the result of the future when the stream may write, at once if nobody waits."""
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
