"""The same as `_failover` for asyncio: a channel to all endpoints of a directory, which belongs to one event loop."""

# ruff: noqa: ASYNC109 - the timeouts are deadlines that travel with the call, so that the server stops its work too

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import grpc.aio

from flywheel_client._errors import call_cancelled, deadline_exceeded, request_id_in
from flywheel_client._pool import Directory, Member, Pool, Tries

Metadata = Sequence[tuple[str, str | bytes]]


class AsyncFailoverChannel:
    """What the clients and the generated stubs use of a `grpc.aio.Channel`."""

    def __init__(self, directory: Directory, open_channel: Callable[[str], grpc.aio.Channel]) -> None:
        self._directory = directory
        self._pool = Pool(open_channel)
        self._reading: asyncio.Task[None] | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._closed = False

    def unary_unary(self, *method: Any, **options: Any) -> Callable[..., Coroutine[Any, Any, Any]]:  # noqa: ANN401 - those of grpc
        """Returns a method that is answered with one message."""
        return _Method(self, lambda channel: channel.unary_unary(*method, **options)).call

    def unary_stream(self, *method: Any, **options: Any) -> "Callable[..., _StreamCall]":  # noqa: ANN401 - those of grpc
        """Returns a method that is answered with a stream."""
        return _Method(self, lambda channel: channel.unary_stream(*method, **options)).stream

    async def close(self) -> None:
        """Closes all channels, which cancels the calls under way."""
        self._closed = True
        if self._reading is not None:
            self._reading.cancel()
        for channel in self._pool.channels():
            await channel.close()
        if self._reading is not None:
            await asyncio.wait({self._reading})

    def pick_now(self, tries: Tries, request_id: str) -> Member[grpc.aio.Channel] | None:
        """Returns the endpoint to try next, which counts as in use until `ended`; None where the directory must be read."""
        self._raise_if_closed(request_id)
        now = time.monotonic()
        member = self._pool.pick(tries, now)
        if member is not None and self._pool.is_old(now):
            self._read()
        return member

    async def pick(self, tries: Tries, request_id: str) -> Member[grpc.aio.Channel]:
        """Returns the endpoint to try next, which counts as in use until `ended`.

        Raises what the call ends with where there is none: the error of its last try, or one of the directory.
        """
        if member := self.pick_now(tries, request_id):
            return member
        error: BaseException | None = None
        if tries.may_reread:
            reading = self._read()
            await asyncio.wait({reading}, timeout=tries.remaining(time.monotonic()))
            self._raise_if_closed(request_id)
            if not reading.done():
                raise deadline_exceeded(request_id)
            error = reading.exception()
            if member := self._pool.pick_after_reading(tries, time.monotonic()):
                return member
        raise tries.error or error or self._directory.no_endpoint()

    def failed(self, tries: Tries, member: Member[grpc.aio.Channel], error: grpc.aio.AioRpcError) -> bool:
        """Notes that a try failed there, and returns whether the endpoint, rather than the call, was to blame."""
        return self._pool.failed(tries, member, error, time.monotonic())

    def ended(self, member: Member[grpc.aio.Channel]) -> None:
        """Notes that a try is over."""
        channel = self._pool.ended(member)
        if channel is not None:
            closing = asyncio.get_running_loop().create_task(channel.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    def _raise_if_closed(self, request_id: str) -> None:
        if self._closed:
            raise call_cancelled(request_id)

    def _read(self) -> asyncio.Task[None]:
        """Begins to read the directory, or returns the reading that is under way."""
        if self._reading is None or self._reading.done():
            self._reading = asyncio.get_running_loop().create_task(self._update())
            self._reading.add_done_callback(_retrieve)
        return self._reading

    async def _update(self) -> None:
        try:
            addresses = await self._directory.read()
        except Exception:
            self._pool.keep(time.monotonic())
            raise
        for channel in self._pool.update(addresses, time.monotonic()):
            await channel.close()


@dataclass(frozen=True, slots=True)
class _Method:
    """A method of the service, on whichever endpoint a call of it goes to."""

    channel: AsyncFailoverChannel
    of: Callable[[grpc.aio.Channel], Callable[..., Any]]

    async def call(self, request: object, timeout: float | None, metadata: Metadata) -> Any:  # noqa: ANN401 - a message
        """Makes a call, and returns the answer."""
        tries = Tries.begin(timeout, time.monotonic())
        while True:
            member = await self.channel.pick(tries, request_id_in(metadata, ""))
            try:
                return await self.begin(member, request, tries, metadata)
            except grpc.aio.AioRpcError as error:
                if not self.channel.failed(tries, member, error):
                    raise

    def stream(self, request: object, timeout: float | None, metadata: Metadata) -> "_StreamCall":
        """Begins a call that is answered with a stream."""
        return _StreamCall(self, request, timeout, metadata)

    def begin(self, member: Member[grpc.aio.Channel], request: object, tries: Tries, metadata: Metadata) -> Any:  # noqa: ANN401
        """Begins to try a call on an endpoint."""
        try:
            current = self.of(member.channel)(request, timeout=tries.remaining(time.monotonic()), metadata=metadata)
        except BaseException:
            self.channel.ended(member)
            raise
        current.add_done_callback(lambda _: self.channel.ended(member))
        return current


class _StreamCall:
    """What the client uses of a call of grpc that is answered with a stream."""

    def __init__(self, method: _Method, request: object, timeout: float | None, metadata: Metadata) -> None:
        self._method = method
        self._request = request
        self._metadata = metadata
        self._request_id = request_id_in(metadata, "")
        self._tries = Tries.begin(timeout, time.monotonic())
        self._member: Member[grpc.aio.Channel]
        self._current: Any = None
        self._beginning: asyncio.Task[None] | None = None
        self._cancelled = False
        # Like a call of grpc, this one begins now, and not when it is iterated over.
        if member := method.channel.pick_now(self._tries, self._request_id):
            self._begin(member)
        else:
            self._begin_soon()

    async def __aiter__(self) -> AsyncIterator[Any]:
        while True:
            if self._beginning is not None:
                await self._beginning
            delivered = False
            try:
                async for message in self._current:
                    delivered = True
                    yield message
            except grpc.aio.AioRpcError as error:
                if not self._method.channel.failed(self._tries, self._member, error) or delivered:
                    raise
            else:
                return
            if self._cancelled:
                raise asyncio.CancelledError
            self._begin_soon()

    async def initial_metadata(self) -> Metadata | None:
        """Returns what the endpoint sent before its first message; call it after that has arrived."""
        metadata: Metadata | None = await self._current.initial_metadata()
        return metadata

    def cancel(self) -> None:
        """Ends the call wherever it is: on an endpoint, between two of them, or waiting for the directory."""
        self._cancelled = True
        if self._beginning is not None:
            self._beginning.cancel()
        if self._current is not None:
            self._current.cancel()

    def _begin_soon(self) -> None:
        self._beginning = asyncio.get_running_loop().create_task(self._pick_and_begin())
        self._beginning.add_done_callback(_retrieve)

    async def _pick_and_begin(self) -> None:
        self._begin(await self._method.channel.pick(self._tries, self._request_id))

    def _begin(self, member: Member[grpc.aio.Channel]) -> None:
        self._member = member
        self._current = self._method.begin(member, self._request, self._tries, self._metadata)


def _retrieve(task: asyncio.Task[None]) -> None:
    """Looks at how a task ended: asyncio complains of an exception that nobody has looked at."""
    if not task.cancelled():
        task.exception()
