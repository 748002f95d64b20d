"""Whose turn it is to write a message: so many streams in each iteration of the event loop.

An event loop works on all that is ready before it looks for new calls. If many streams write in one iteration, new calls wait
for all of them, several times over. So the streams that have something to write take turns: a few of them write in each
iteration, and calls that arrive meanwhile are served in between. While the loop keeps up, it is everybody's turn at once. While
it does not, text piles up in the buffers of the streams that wait, and leaves them in larger messages.
"""

import asyncio
from collections import deque
from typing import Final

TURNS_PER_ITERATION: Final = 16
"""How many streams write in one iteration of the event loop. Many iterations with few messages in each make messages dearer."""

TURNS_WHEN_BEHIND: Final = 2
"""How many they are while the server is behind.

grpc.aio takes five iterations to accept a call, and accepts one call after the other. A server that keeps up has iterations
without much to do, and accepts calls in these. One that is behind has none, so its iterations must be short.
"""

BEHIND_AFTER: Final = 48
"""For how many iterations in a row streams must have waited for their turn until the server is behind: some 30 ms."""


class Turns:
    """Grants turns: first to streams that have written nothing yet, then to those that have waited longest.

    One turn of each iteration goes to who has waited longest in any case, so that no number of new streams stops the others.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._new: deque[asyncio.Future[None]] = deque()
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._turns = self._left = TURNS_PER_ITERATION
        """How many turns an iteration has, and how many may still be granted in this one."""
        self._waited = 0
        """For how many iterations in a row streams have waited."""

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
        if self._left == self._turns:
            # Asking for the loop is a call of the system.
            self._loop = self._loop or asyncio.get_running_loop()
            self._loop.call_soon(self._next_iteration)
        self._left -= 1
        turn.set_result(None)

    def _next_iteration(self) -> None:
        self._waited = self._waited + 1 if self._waiting or self._new else 0
        self._turns = self._left = TURNS_PER_ITERATION if self._waited < BEHIND_AFTER else TURNS_WHEN_BEHIND
        self._grant_until(self._turns - 1, self._waiting)
        self._grant_until(0, self._new)
        self._grant_until(0, self._waiting)

    def _grant_until(self, left: int, waiting: deque[asyncio.Future[None]]) -> None:
        while self._left > left and waiting:
            self._grant(waiting.popleft())
