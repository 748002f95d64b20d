"""The counterpart of `_failover_sync` for asyncio. A channel belongs to one event loop."""

import asyncio
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from math import inf

import grpc.aio

from flywheel_client._calls_async import AsyncCall, AsyncRetryingChannel, retrieve
from flywheel_client._errors import FlywheelError, deadline_exceeded
from flywheel_client._health import probe
from flywheel_client._pool import Directory, Member, Pool
from flywheel_client._retry import Retry, Tries


class AsyncFailoverChannel(AsyncRetryingChannel):
    """A channel that picks an endpoint for each call of a client."""

    grpc_waits = False

    def __init__(self, directory: Directory, open_channel: Callable[[str], grpc.aio.Channel], retry: Retry | None) -> None:
        super().__init__(retry)
        self._directory = directory
        self._pool = Pool(open_channel)
        self._reading: asyncio.Task[None] | None = None
        self._probes: set[asyncio.Task[None]] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        """Set, and replaced by a new event, when a probe or a reading has ended or the channel is closed."""

    async def close(self) -> None:
        """Closes all channels, which cancels running and waiting calls."""
        if self._reading is not None:
            self._reading.cancel()
        await super().close()
        self._notify()
        for task in self._probes:
            task.cancel()
        if ending := self._probes | self._closing | ({self._reading} if self._reading is not None else set()):
            await asyncio.wait(ending)

    def _channels(self) -> Collection[grpc.aio.Channel]:
        return self._pool.channels()

    def pick_now(self, call: AsyncCall) -> Member[grpc.aio.Channel] | None:
        """Returns the endpoint for the next try, which counts as in use until `release`; None if finding it has to wait."""
        self.raise_if_cancelled(call)
        now = time.monotonic()
        return self._pick(call, now) if self._pool.is_usable(now) else None

    async def pick(self, call: AsyncCall) -> Member[grpc.aio.Channel]:
        """Returns the endpoint for the next try, which counts as in use until `release`.

        If there is no endpoint to try, raises the error of the last try, or else the error of the directory.
        """
        reading: asyncio.Task[None] | None = None
        while True:
            self.raise_if_cancelled(call)
            now = time.monotonic()
            # After its own reading, the call uses the pool even if that reading failed.
            pool_is_usable = reading is not None or self._pool.is_usable(now)
            if pool_is_usable and (member := self._pick(call, now)):
                return member
            if pool_is_usable and (seconds := self._pool.seconds_to_wait(call.tries, now)) is not None:
                await self._wait(call, seconds)
            elif reading is None and call.tries.may_reread:
                reading = self._read()
                while not reading.done():
                    await self._wait(call, inf)
                # After an endpoint has failed, one new reading is enough for a round.
                call.tries.may_reread = not call.tries.failed
            else:
                call.tries.error = call.tries.error or self._pool.probe_error
                raise call.tries.error or (reading and reading.exception()) or self._directory.no_endpoint()

    def _pick(self, call: AsyncCall, now: float) -> Member[grpc.aio.Channel] | None:
        member = self._pool.pick(call.tries, now)
        if member is not None and self._pool.needs_refresh(now):
            self._read()
        return member

    async def _wait(self, call: AsyncCall, seconds: float) -> None:
        """Waits for a change of the pool, at most so many seconds; raises if the call ends meanwhile."""
        remaining = call.tries.remaining(time.monotonic())
        if remaining == 0:
            raise call.tries.error or deadline_exceeded(call.request_id)
        limit = min(seconds, inf if remaining is None else remaining)
        changed = self._changed
        with suppress(TimeoutError):
            async with asyncio.timeout(None if limit == inf else limit):
                await changed.wait()
        self.raise_if_cancelled(call)

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def record_failure(self, member: Member[grpc.aio.Channel], tries: Tries, error: grpc.RpcError | FlywheelError) -> bool:
        """Records a failed try. Returns whether the endpoint is to blame, so that another one may be tried at once."""
        to_blame = self._pool.record_failure(tries, member, error, time.monotonic())
        self._probe()
        return to_blame

    def release(self, member: Member[grpc.aio.Channel]) -> None:
        """Records the end of a try."""
        channel = self._pool.release(member)
        self._close_soon([] if channel is None else [channel])

    def _close_soon(self, channels: Iterable[grpc.aio.Channel]) -> None:
        for channel in channels:
            closing = asyncio.get_running_loop().create_task(channel.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    def _probe(self) -> None:
        """Starts probes of the endpoints that need one, up to the limit of concurrent probes."""
        if not self.is_closed:
            for member in self._pool.begin_probes():
                task = asyncio.get_running_loop().create_task(self._probe_one(member))
                self._probes.add(task)
                task.add_done_callback(self._probes.discard)

    async def _probe_one(self, member: Member[grpc.aio.Channel]) -> None:
        no_answer, not_serving = await probe(member.channel)
        self._close_soon(self._pool.record_probe(member, no_answer, time.monotonic(), not_serving=not_serving))
        self._notify()
        self._probe()

    def _read(self) -> asyncio.Task[None]:
        """Starts reading the directory; returns the current reading if there is one."""
        if self._reading is None or self._reading.done():
            self._reading = asyncio.get_running_loop().create_task(self._update())
            self._reading.add_done_callback(self._reading_ended)
        return self._reading

    def _reading_ended(self, reading: asyncio.Task[None]) -> None:
        retrieve(reading)
        self._notify()

    async def _update(self) -> None:
        try:
            await asyncio.sleep(self._pool.begin_read(time.monotonic()))
            addresses = await self._directory.read()
        except Exception:
            self._pool.record_unreadable(time.monotonic())
            raise
        if self.is_closed:
            return
        self._close_soon(self._pool.update(addresses, time.monotonic()))
        self._probe()
