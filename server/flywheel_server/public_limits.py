"""Bounds what callers without a key may take of the server: how many calls at a time, and for how long.

An honest caller must be served whatever the others do. So a connection with many calls gives way to one with few, and a call
that takes long gives way to one that waits.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from flywheel_server import running_time
from flywheel_server.errors import IncompleteRequestError, ServerFullError

MAX_REQUEST_BYTES: Final = 4096
"""The largest request, after decompression. Names of services, files and symbols are much shorter."""
MAX_TURNS: Final = 16
"""Calls whose request is received and answered at a time. gRPC may hold `max_message_bytes` for each of them."""
TURN_TIMEOUT: Final = 5.0
"""Seconds that a turn may last, and that a call waits for one."""
HURRIED_TURN_TIMEOUT: Final = 0.1
"""Seconds that a turn may last while others wait. An honest request arrives together with its headers."""
LAG: Final = 0.02
"""Seconds in which the event loop learns of what has arrived while it was busy."""
MAX_BRIEF_CALLS: Final = 1024
"""Calls that wait for a turn or have one."""
MAX_CALLS_PER_CONNECTION: Final = 128
"""Brief calls of one connection, and Watch streams of one connection: a proxy may carry those of all its clients."""
MAX_UNREAD_ANSWERS: Final = 8
"""Answers that a connection may leave unread. gRPC keeps them until the connection ends."""
MAX_WASTEFUL_CONNECTIONS: Final = 1024
"""Connections of which the server remembers that they have wasted a turn."""
RETRY_DELAY: Final = 1.0
"""Seconds after which a refused call may try again."""


class Places:
    """Bounds how many calls are open at a time, in all and for each connection."""

    def __init__(self, limit: int, per_connection: int = MAX_CALLS_PER_CONNECTION) -> None:
        self._limit = limit
        self._per_connection = per_connection
        self._taken = 0
        self._by_connection: dict[str, list[asyncio.Timeout]] = {}

    @asynccontextmanager
    async def place(self, connection: str) -> AsyncIterator[None]:
        """Holds a place for the length of the context.

        Raises `ServerFullError` if there is no place. It is raised from within the context if the place is taken away: the
        connection with the most places gives up its newest one for a connection with fewer.
        """
        self._make_room(connection)
        scope = asyncio.timeout(None)
        self._by_connection.setdefault(connection, []).append(scope)
        self._taken += 1
        try:
            async with scope:
                yield
        except TimeoutError as error:
            if scope.expired():
                raise ServerFullError(RETRY_DELAY) from error
            raise
        finally:
            if scope in self._by_connection.get(connection, ()):
                self._remove(connection, scope)

    def _make_room(self, connection: str) -> None:
        own = len(self._by_connection.get(connection, ()))
        if own >= self._per_connection:
            raise ServerFullError(RETRY_DELAY)
        if self._taken < self._limit:
            return
        largest = max(self._by_connection, key=lambda each: len(self._by_connection[each]))
        if len(self._by_connection[largest]) <= own + 1:
            raise ServerFullError(RETRY_DELAY)
        newest = self._by_connection[largest][-1]
        self._remove(largest, newest)
        newest.reschedule(asyncio.get_running_loop().time())

    def _remove(self, connection: str, scope: asyncio.Timeout) -> None:
        self._taken -= 1
        self._by_connection[connection].remove(scope)
        if not self._by_connection[connection]:
            del self._by_connection[connection]


class Turns:
    """Lets a few calls at a time have the server's attention, and none of them for long while others wait.

    The connections that wait are served in turn. One that has not waited yet goes first: somebody who wants much is already
    waiting, somebody who wants little has just come. But a connection that has wasted its last turn goes last: its request did
    not arrive, or its caller took the call back. Otherwise a stranger could come first again with each call.
    """

    def __init__(self, limit: int = MAX_TURNS) -> None:
        self._free = limit
        self._running: set[_Turn] = set()
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        self._wasteful: OrderedDict[str, None] = OrderedDict()

    @asynccontextmanager
    async def turn(self, connection: str) -> AsyncIterator[None]:
        """Waits for a turn, and has it for the length of the context.

        Raises `ServerFullError` if no turn comes, or from within the context if it lasts too long while others wait, and
        `IncompleteRequestError` from within the context if it lasts too long otherwise.
        """
        await self._admitted(connection)
        turn = _Turn()
        try:
            async with turn.scope:
                self._running.add(turn)
                if self._waiting:
                    turn.hurry()
                yield
            self._wasteful.pop(connection, None)
        except asyncio.CancelledError:
            self._remember_waste(connection)
            raise
        except TimeoutError as error:
            if turn.scope.expired():
                self._remember_waste(connection)
                raise (ServerFullError(RETRY_DELAY) if turn.is_hurried else IncompleteRequestError) from error
            raise
        finally:
            self._running.discard(turn)
            turn.stop_timers()
            self._pass_on()

    async def _admitted(self, connection: str) -> None:
        if self._free:
            self._free -= 1
            return
        for turn in self._running:
            turn.hurry()
        admitted = self._wait(connection)
        try:
            async with running_time.timeout(TURN_TIMEOUT):
                await admitted
        except BaseException as error:
            if admitted.done() and not admitted.cancelled():
                self._pass_on()
            else:
                self._leave(connection, admitted)
            if isinstance(error, TimeoutError):
                raise ServerFullError(RETRY_DELAY) from error
            raise

    def _wait(self, connection: str) -> asyncio.Future[None]:
        admitted = asyncio.get_running_loop().create_future()
        if connection not in self._waiting:
            self._waiting[connection] = deque()
            if connection not in self._wasteful:
                self._waiting.move_to_end(connection, last=False)
        self._waiting[connection].append(admitted)
        return admitted

    def _remember_waste(self, connection: str) -> None:
        self._wasteful[connection] = None
        if len(self._wasteful) > MAX_WASTEFUL_CONNECTIONS:
            self._wasteful.popitem(last=False)

    def _leave(self, connection: str, admitted: asyncio.Future[None]) -> None:
        waiting = self._waiting.get(connection, ())
        if admitted in waiting:
            self._waiting[connection].remove(admitted)
            if not waiting:
                del self._waiting[connection]

    def _pass_on(self) -> None:
        while self._waiting:
            connection, waiting = next(iter(self._waiting.items()))
            admitted = waiting.popleft()
            self._waiting.move_to_end(connection)
            if not waiting:
                del self._waiting[connection]
            if not admitted.done():  # else its call was cancelled in this moment
                admitted.set_result(None)
                return
        self._free += 1


class _Turn:
    def __init__(self) -> None:
        self._clock = running_time.clock()
        self._began = self._clock.time()
        self._ending: running_time.Timer | None = None
        self.scope = asyncio.timeout(None)
        self._expiry = self._clock.call_later(TURN_TIMEOUT, lambda: running_time.expire(self.scope))

    @property
    def is_hurried(self) -> bool:
        return self._ending is not None

    def hurry(self) -> None:
        """Ends the turn as soon as it has lasted as long as it may while others wait."""
        if self._ending is None:
            self._ending = self._clock.call_later(self._began + HURRIED_TURN_TIMEOUT - self._clock.time(), self._end)

    def _end(self) -> None:
        # Not at once: if the event loop was busy, the request may have arrived without the call having learned of it.
        if not self.scope.expired():
            self.scope.reschedule(self._clock.loop.time() + LAG)

    def stop_timers(self) -> None:
        """Leaves the scope alone from now on: it has ended."""
        self._expiry.cancel()
        if self._ending is not None:
            self._ending.cancel()
