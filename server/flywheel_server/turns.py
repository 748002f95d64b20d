"""Whose turn it is to write a message: so many streams in each iteration of the event loop.

An event loop works on all that is ready before it looks for new calls. If many streams write in one iteration, new calls wait
for all of them, several times over. So the streams that have something to write take turns: a few of them write in each
iteration, and calls that arrive meanwhile are served in between. While the loop keeps up, it is everybody's turn at once. While
it does not, text piles up in the buffers of the streams that wait, and leaves them in larger messages.
"""

import asyncio
from collections import deque
from typing import Final

TURNS_PER_ITERATION: Final = 4
"""How many streams write in one iteration of the event loop: about a sixth of a millisecond of work.

grpc.aio takes five iterations to accept a call, one call after the other.
"""


class Turns:
    """Grants turns: first to streams that have written nothing yet, then to those that have waited longest.

    One turn of each iteration goes to who has waited longest in any case, so that no number of new streams stops the others.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._new: deque[asyncio.Future[None]] = deque()
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._left = TURNS_PER_ITERATION
        """How many turns may still be granted in this iteration."""

    def ask(self, turn: asyncio.Future[None], *, is_first: bool) -> None:
        """Sets the result of the future when it is the turn of the stream, at once if nobody waits."""
        if self._left and not self._waiting:
            self._grant(turn)
        elif is_first:
            self._new.append(turn)
        else:
            self._waiting.append(turn)

    def _grant(self, turn: asyncio.Future[None]) -> None:
        if turn.done():
            return  # its call has ended
        if self._left == TURNS_PER_ITERATION:
            # Asking for the loop is a call of the system.
            self._loop = self._loop or asyncio.get_running_loop()
            self._loop.call_soon(self._next_iteration)
        self._left -= 1
        turn.set_result(None)

    def _next_iteration(self) -> None:
        self._left = TURNS_PER_ITERATION
        self._grant_until(TURNS_PER_ITERATION - 1, self._waiting)
        self._grant_until(0, self._new)
        self._grant_until(0, self._waiting)

    def _grant_until(self, left: int, waiting: deque[asyncio.Future[None]]) -> None:
        while self._left > left and waiting:
            self._grant(waiting.popleft())
