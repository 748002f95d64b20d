"""Limits calls that need no key: how many run at a time, and for how long.

An honest caller must be served even if others attack. So a connection with many calls loses calls to a connection with few, and
a slow call is ended for a call that waits.
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
MAX_CONCURRENT_REQUESTS: Final = 16
"""Requests that are received and answered at a time. gRPC may hold `max_message_bytes` for each of them."""
SLOT_TIMEOUT: Final = 5.0
"""Seconds that a request may hold a slot, and that it may wait for one."""
CONTENDED_SLOT_TIMEOUT: Final = 0.1
"""Seconds that a request may hold a slot while others wait. An honest request arrives together with its headers."""
EVENT_LOOP_DELAY: Final = 0.02
"""Seconds within which the event loop handles what arrived while it was busy."""
MAX_SHORT_CALLS: Final = 1024
"""Calls that wait for a slot or hold one."""
MAX_CALLS_PER_CONNECTION: Final = 128
"""Short calls of one connection, and Watch streams of one connection. A proxy may carry all its clients' calls on one."""
MAX_UNREAD_ANSWERS: Final = 8
"""Answers that a connection may leave unread. gRPC keeps them until the connection ends."""
MAX_WASTEFUL_CONNECTIONS: Final = 1024
"""Connections that are remembered because they wasted a slot."""
RETRY_DELAY: Final = 1.0
"""Seconds after which a refused call may try again."""


class CallLimit:
    """Limits how many calls are open at a time, in total and for each connection."""

    def __init__(self, limit: int, per_connection: int = MAX_CALLS_PER_CONNECTION) -> None:
        self._limit = limit
        self._per_connection = per_connection
        self._open_calls = 0
        self._by_connection: dict[str, list[asyncio.Timeout]] = {}

    @asynccontextmanager
    async def call(self, connection: str) -> AsyncIterator[None]:
        """Counts a call as open for the length of the context.

        Raises `ServerFullError` if too many calls are open. But if the connection with the most calls has more than the call's
        own connection would have, its newest call is ended instead: the context of that call raises `ServerFullError`.
        """
        self._make_room(connection)
        scope = asyncio.timeout(None)
        self._by_connection.setdefault(connection, []).append(scope)
        self._open_calls += 1
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
        if self._open_calls < self._limit:
            return
        largest = max(self._by_connection, key=lambda each: len(self._by_connection[each]))
        if len(self._by_connection[largest]) <= own + 1:
            raise ServerFullError(RETRY_DELAY)
        newest = self._by_connection[largest][-1]
        self._remove(largest, newest)
        newest.reschedule(asyncio.get_running_loop().time())

    def _remove(self, connection: str, scope: asyncio.Timeout) -> None:
        self._open_calls -= 1
        self._by_connection[connection].remove(scope)
        if not self._by_connection[connection]:
            del self._by_connection[connection]


class FairSlots:
    """Slots for requests, shared fairly by all connections. While others wait, no request holds a slot for long.

    Waiting connections are served round robin. A connection that is not waiting yet goes to the front, because an attacker's
    connections are already waiting. But it goes to the back if it wasted its last slot: its request did not arrive, or the call
    was cancelled. Otherwise an attacker could go to the front again with each call.
    """

    def __init__(self, limit: int = MAX_CONCURRENT_REQUESTS) -> None:
        self._free = limit
        self._running: set[_Slot] = set()
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        self._wasteful: OrderedDict[str, None] = OrderedDict()

    @asynccontextmanager
    async def slot(self, connection: str) -> AsyncIterator[None]:
        """Waits for a slot, and holds it for the length of the context.

        Raises `ServerFullError` if no slot becomes free in time. If the slot is held for too long, the context raises
        `ServerFullError` if others wait, and `IncompleteRequestError` if not.
        """
        await self._acquire(connection)
        slot = _Slot()
        try:
            async with slot.scope:
                self._running.add(slot)
                if self._waiting:
                    slot.mark_contended()
                yield
            self._wasteful.pop(connection, None)
        except asyncio.CancelledError:
            self._remember_waste(connection)
            raise
        except TimeoutError as error:
            if slot.scope.expired():
                self._remember_waste(connection)
                raise (ServerFullError(RETRY_DELAY) if slot.is_contended else IncompleteRequestError) from error
            raise
        finally:
            self._running.discard(slot)
            slot.stop_timers()
            self._release()

    async def _acquire(self, connection: str) -> None:
        if self._free:
            self._free -= 1
            return
        for slot in self._running:
            slot.mark_contended()
        granted = self._join_queue(connection)
        try:
            async with running_time.timeout(SLOT_TIMEOUT):
                await granted
        except BaseException as error:
            if granted.done() and not granted.cancelled():
                self._release()
            else:
                self._leave_queue(connection, granted)
            if isinstance(error, TimeoutError):
                raise ServerFullError(RETRY_DELAY) from error
            raise

    def _join_queue(self, connection: str) -> asyncio.Future[None]:
        granted = asyncio.get_running_loop().create_future()
        if connection not in self._waiting:
            self._waiting[connection] = deque()
            if connection not in self._wasteful:
                self._waiting.move_to_end(connection, last=False)
        self._waiting[connection].append(granted)
        return granted

    def _remember_waste(self, connection: str) -> None:
        self._wasteful[connection] = None
        if len(self._wasteful) > MAX_WASTEFUL_CONNECTIONS:
            self._wasteful.popitem(last=False)

    def _leave_queue(self, connection: str, granted: asyncio.Future[None]) -> None:
        waiting = self._waiting.get(connection, ())
        if granted in waiting:
            self._waiting[connection].remove(granted)
            if not waiting:
                del self._waiting[connection]

    def _release(self) -> None:
        while self._waiting:
            connection, waiting = next(iter(self._waiting.items()))
            granted = waiting.popleft()
            self._waiting.move_to_end(connection)
            if not waiting:
                del self._waiting[connection]
            if not granted.done():  # otherwise its call was cancelled at this moment
                granted.set_result(None)
                return
        self._free += 1


class _Slot:
    def __init__(self) -> None:
        self._clock = running_time.clock()
        self._started = self._clock.time()
        self._contended_expiry: running_time.Timer | None = None
        self.scope = asyncio.timeout(None)
        self._expiry = self._clock.call_later(SLOT_TIMEOUT, lambda: running_time.expire(self.scope))

    @property
    def is_contended(self) -> bool:
        return self._contended_expiry is not None

    def mark_contended(self) -> None:
        """Applies `CONTENDED_SLOT_TIMEOUT`, because others wait."""
        if self._contended_expiry is None:
            self._contended_expiry = self._clock.call_later(
                self._started + CONTENDED_SLOT_TIMEOUT - self._clock.time(), self._end
            )

    def _end(self) -> None:
        # Not at once: if the event loop was busy, the request may have arrived, but the call has not been resumed yet.
        if not self.scope.expired():
            self.scope.reschedule(self._clock.loop.time() + EVENT_LOOP_DELAY)

    def stop_timers(self) -> None:
        """Stops all timers, because the slot has been released."""
        self._expiry.cancel()
        if self._contended_expiry is not None:
            self._contended_expiry.cancel()
