"""The same as `_failover` for asyncio: a channel to all endpoints of a directory, which belongs to one event loop."""

import asyncio
import time
from collections.abc import Callable, Collection

import grpc.aio

from flywheel_client._async_calls import AsyncRetryingChannel, Call, retrieve
from flywheel_client._errors import FlywheelError, deadline_exceeded
from flywheel_client._pool import Directory, Member, Pool
from flywheel_client._retry import Retry


class AsyncFailoverChannel(AsyncRetryingChannel):
    """Finds the endpoint for each call of a client."""

    grpc_waits = False

    def __init__(self, directory: Directory, open_channel: Callable[[str], grpc.aio.Channel], retry: Retry | None) -> None:
        super().__init__(retry)
        self._directory = directory
        self._pool = Pool(open_channel)
        self._reading: asyncio.Task[None] | None = None
        self._closing: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Closes all channels, which cancels the calls under way and those that wait."""
        if self._reading is not None:
            self._reading.cancel()
        await super().close()
        if self._reading is not None:
            await asyncio.wait({self._reading})

    def _channels(self) -> Collection[grpc.aio.Channel]:
        return self._pool.channels()

    def pick_now(self, call: Call) -> Member[grpc.aio.Channel] | None:
        """Returns the endpoint to try next, which counts as in use until `ended`; None where the directory must be read."""
        self.raise_if_closed(call)
        now = time.monotonic()
        member = self._pool.pick(call.tries, now)
        if member is not None and self._pool.is_old(now):
            self._read()
        return member

    async def pick(self, call: Call) -> Member[grpc.aio.Channel]:
        """Returns the endpoint to try next, which counts as in use until `ended`.

        Raises what the call ends with where there is none: the error of its last try, or one of the directory.
        """
        if member := self.pick_now(call):
            return member
        error: BaseException | None = None
        if call.tries.may_reread:
            reading = self._read()
            await asyncio.wait({reading}, timeout=call.tries.remaining(time.monotonic()))
            self.raise_if_closed(call)
            if not reading.done():
                raise deadline_exceeded(call.request_id)
            error = reading.exception()
            if member := self._pool.pick_after_reading(call.tries, time.monotonic()):
                return member
        raise call.tries.error or error or self._directory.no_endpoint()

    def is_to_blame(self, member: Member[grpc.aio.Channel], call: Call, error: grpc.aio.AioRpcError | FlywheelError) -> bool:
        """Notes that a try of a call failed there, and returns whether another endpoint may do better at once."""
        return self._pool.failed(call.tries, member, error, time.monotonic())

    def ended(self, member: Member[grpc.aio.Channel]) -> None:
        """Notes that a try is over."""
        channel = self._pool.ended(member)
        if channel is not None:
            closing = asyncio.get_running_loop().create_task(channel.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    def _read(self) -> asyncio.Task[None]:
        """Begins to read the directory, or returns the reading that is under way."""
        if self._reading is None or self._reading.done():
            self._reading = asyncio.get_running_loop().create_task(self._update())
            self._reading.add_done_callback(retrieve)
        return self._reading

    async def _update(self) -> None:
        try:
            addresses = await self._directory.read()
        except Exception:
            self._pool.keep(time.monotonic())
            raise
        for channel in self._pool.update(addresses, time.monotonic()):
            await channel.close()
