"""A channel to all endpoints of a directory, for threads: each call to one of them, and to another if that one is gone.

A call that finds its endpoint gone, or about to stop, before the engine has begun on it is tried elsewhere at once, within its
deadline and its attempts. Only if it has tried them all does it wait before it goes round again.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final

import grpc

from flywheel_client._calls import Call, RetryingChannel
from flywheel_client._errors import FlywheelError, deadline_exceeded
from flywheel_client._pool import Directory, Member, Pool
from flywheel_client._retry import Retry

CLOSING: Final = 0.05
"""Seconds after which a reading of the directory ends at the latest once the client is closed."""


@dataclass(slots=True)
class _Reading:
    """A reading of the directory that is under way, and then how it ended."""

    finished: bool = False
    error: BaseException | None = None


class FailoverChannel(RetryingChannel):
    """Finds the endpoint for each call of a client."""

    grpc_waits = False

    def __init__(self, directory: Directory, open_channel: Callable[[str], grpc.Channel], retry: Retry | None) -> None:
        super().__init__(retry)
        self._directory = directory
        self._pool = Pool(open_channel)
        self._reading: _Reading | None = None

    def _channels(self) -> Collection[grpc.Channel]:
        return self._pool.channels()

    def pick(self, call: Call) -> Member[grpc.Channel]:
        """Returns the endpoint to try next, which counts as in use until `ended`.

        Raises what the call ends with where there is none: the error of its last try, or one of the directory.
        """
        with self._changed:
            self.raise_if_cancelled(call)
            now = time.monotonic()
            member = self._pool.pick(call.tries, now)
            if member is not None:
                if self._pool.is_old(now):
                    self._read()
                return member
            error: BaseException | None = None
            if call.tries.may_reread:
                reading = self._read()
                self._changed.wait_for(lambda: reading.finished or call.cancelled or self._closed, call.tries.remaining(now))
                self.raise_if_cancelled(call)
                if not reading.finished:
                    raise deadline_exceeded(call.request_id)
                error = reading.error
                member = self._pool.pick_after_reading(call.tries, time.monotonic())
        if member is None:
            raise call.tries.error or error or self._directory.no_endpoint()
        return member

    def is_to_blame(self, member: Member[grpc.Channel], call: Call, error: grpc.RpcError | FlywheelError) -> bool:
        """Notes that a try of a call failed there, and returns whether another endpoint may do better at once."""
        with self._changed:
            return self._pool.failed(call.tries, member, error, time.monotonic())

    def ended(self, member: Member[grpc.Channel]) -> None:
        """Notes that a try is over."""
        with self._changed:
            channel = self._pool.ended(member)
        if channel is not None:
            # Not here, which may be the channel's own thread: closing it waits for that.
            threading.Thread(target=channel.close, daemon=True).start()

    def _read(self) -> _Reading:
        """Begins to read the directory, or returns the reading that is under way."""
        if self._reading is None:
            reading = _Reading()
            # Not a daemon, which a process that ends would leave among the ruins of the libraries that it uses.
            threading.Thread(target=self._read_in_thread, args=(reading,)).start()
            self._reading = reading
        return self._reading

    async def _read_unless_closed(self) -> Collection[str]:
        reading = asyncio.ensure_future(self._directory.read())
        while not reading.done():
            await asyncio.wait({reading}, timeout=CLOSING)
            if self._closed:
                reading.cancel()
        return reading.result()

    def _read_in_thread(self, reading: _Reading) -> None:
        unneeded: list[grpc.Channel] = []
        try:
            addresses = asyncio.run(self._read_unless_closed())
            with self._changed:
                if not self._closed:
                    unneeded = self._pool.update(addresses, time.monotonic())
        except BaseException as error:  # noqa: BLE001 - raised to whoever waits for the reading
            reading.error = error
        with self._changed:
            if reading.error is not None:
                self._pool.keep(time.monotonic())
            reading.finished = True
            self._reading = None
            self._changed.notify_all()
        for channel in unneeded:
            channel.close()
