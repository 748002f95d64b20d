"""The counterpart of `_calls_sync` for asyncio. A channel belongs to one event loop."""

import asyncio
import functools
from abc import abstractmethod
from collections.abc import AsyncIterator, Callable
from typing import Any
from weakref import WeakSet

import grpc.aio

from flywheel_client._calls import BaseCall, BaseChannel, Metadata, require_message
from flywheel_client._errors import FlywheelError, call_cancelled, unknown_status
from flywheel_client._pool import Member
from flywheel_client._retry import Retry


class AsyncRetryingChannel(BaseChannel[grpc.aio.Channel]):
    """The part of `grpc.aio.Channel` that the clients and the generated stubs use, with retries."""

    def __init__(self, retry: Retry | None) -> None:
        super().__init__(retry)
        self._closed = asyncio.get_running_loop().create_future()
        self._streams: WeakSet[_StreamCall] = WeakSet()

    def _unary(self, method: str, bind: Callable[[grpc.aio.Channel], Any]) -> Callable[..., Any]:
        async def answer(request: object, **options: Any) -> Any:  # noqa: ANN401 - the options of `BaseCall`
            return await _UnaryCall(self, method, bind, request, **options).answer()

        return answer

    def _stream(self, method: str, bind: Callable[[grpc.aio.Channel], Any]) -> Callable[..., Any]:
        return functools.partial(_StreamCall, self, method, bind)

    def add_stream(self, call: "_StreamCall") -> None:
        """Makes `close` cancel the call, if the call still exists then."""
        self._streams.add(call)

    async def close(self) -> None:
        """Closes all channels, which cancels running calls and calls that wait for their next try."""
        if not self.is_closed:
            self.is_closed = True
            self._closed.set_result(None)
        # Older versions of grpcio, such as 1.73, do not end streams when their channel is closed.
        for stream in list(self._streams):
            stream.cancel()
        for channel in self._channels():
            await channel.close()

    @abstractmethod
    def pick_now(self, call: "AsyncCall") -> Member[grpc.aio.Channel] | None:
        """Returns the endpoint for the next try, which counts as in use until `release`; None if finding it has to wait."""

    @abstractmethod
    async def pick(self, call: "AsyncCall") -> Member[grpc.aio.Channel]:
        """Returns the endpoint for the next try, which counts as in use until `release`.

        Raises the call's error if there is no endpoint to try.
        """

    async def pause(self, call: "AsyncCall", seconds: float) -> None:
        """Waits, or raises `CallCancelledError` as soon as the channel is closed."""
        if seconds:
            await asyncio.wait({self._closed}, timeout=seconds)
        self.raise_if_cancelled(call)


class AsyncTargetChannel(AsyncRetryingChannel):
    """A channel to one target of gRPC. grpc itself finds the target's servers."""

    grpc_waits = True

    def __init__(self, target: str, channel: grpc.aio.Channel, retry: Retry | None) -> None:
        super().__init__(retry)
        self._member = Member(target, channel)

    def pick_now(self, call: "AsyncCall") -> Member[grpc.aio.Channel]:
        """Returns the target."""
        self.raise_if_cancelled(call)
        return self._member

    async def pick(self, call: "AsyncCall") -> Member[grpc.aio.Channel]:
        """Returns the target."""
        return self.pick_now(call)

    def _channels(self) -> list[grpc.aio.Channel]:
        return [self._member.channel]


class AsyncCall(BaseCall[grpc.aio.Channel]):
    """A call through all its tries."""

    def __init__(self, channel: AsyncRetryingChannel, *arguments: Any, **options: Any) -> None:  # noqa: ANN401 - the arguments of `BaseCall`
        super().__init__(channel, *arguments, **options)
        self._channel = channel

    async def _next_try(self, delay: float) -> Any:  # noqa: ANN401 - a call of grpc
        self.member = None
        await self._channel.pause(self, delay)
        return self._begin(await self._channel.pick(self))

    def _begin(self, member: Member[grpc.aio.Channel]) -> Any:  # noqa: ANN401 - a call of grpc
        self.member = member
        try:
            current = self._send(member.channel)
        except BaseException:
            self._channel.release(member)
            raise
        current.add_done_callback(lambda _: self._channel.release(member))
        return current


class _UnaryCall(AsyncCall):
    """A call whose answer is one message."""

    async def answer(self) -> Any:  # noqa: ANN401 - a message of the method
        """Returns the answer, as soon as it arrives."""
        try:
            message = await self._receive()
        except BaseException as error:
            self.span.end(error)
            raise
        self.span.receive(message)
        self.span.end()
        return message

    async def _receive(self) -> Any:  # noqa: ANN401 - as above
        delay = 0.0
        while True:
            cancellations = _cancellations()
            try:
                message = await (await self._next_try(delay))
            except asyncio.CancelledError:
                if self._channel.is_closed and _cancellations() == cancellations:
                    raise call_cancelled(self.request_id) from None
                raise
            except (grpc.aio.AioRpcError, FlywheelError) as error:
                next_delay = self._channel.delay(self, error)
                if next_delay is None:
                    raise
                delay = next_delay
            except KeyError as error:
                raise unknown_status(self.request_id) from error
            else:
                return require_message(message, self.request_id)


class _StreamCall(AsyncCall):
    """A call whose answer is a stream."""

    def __init__(self, *arguments: Any, **options: Any) -> None:  # noqa: ANN401 - the arguments of `BaseCall`
        super().__init__(*arguments, **options)
        self._current: Any = None
        self._beginning: asyncio.Task[None] | None = None
        self._channel.add_stream(self)
        # As in grpc, a call begins at once, and not at the first iteration.
        if member := self._channel.pick_now(self):
            self._current = self._begin(member)
        else:
            self._begin_soon(0.0)

    async def __aiter__(self) -> AsyncIterator[Any]:
        # A generator, because an event loop closes the generators that are left when it shuts down.
        messages: AsyncIterator[Any] | None = None
        delivered = False
        try:
            while True:
                self._channel.raise_if_cancelled(self)
                cancellations = _cancellations()
                try:
                    if messages is None:
                        messages = await self._messages()
                    message = await anext(messages)
                except StopAsyncIteration:
                    self.span.end()
                    return
                except asyncio.CancelledError:
                    if _cancellations() == cancellations:
                        self._channel.raise_if_cancelled(self)
                    raise
                except (grpc.aio.AioRpcError, FlywheelError) as error:
                    delay = self._channel.delay(self, error)
                    if delay is None or delivered:
                        self.span.end(error)
                        raise
                    messages = None
                    self._begin_soon(delay)
                except KeyError as error:
                    unknown = unknown_status(self.request_id)
                    self.span.end(unknown)
                    raise unknown from error
                else:
                    delivered = True
                    yield self._checked(message)
        finally:
            self.cancel()

    def _checked(self, message: Any) -> Any:  # noqa: ANN401 - a message of the method
        try:
            message = require_message(message, self.request_id)
        except FlywheelError as error:
            self.span.end(error)
            raise
        self.span.receive(message)
        return message

    async def _messages(self) -> AsyncIterator[Any]:
        if self._beginning is not None:
            await self._beginning
        return aiter(self._current)

    async def initial_metadata(self) -> Metadata | None:
        """Returns the initial metadata of the endpoint. Call this after the first message has arrived."""
        metadata: Metadata | None = await self._current.initial_metadata()
        return metadata

    def cancel(self) -> None:
        """Ends the call: on its endpoint, between two tries, or while it waits for the directory."""
        self.cancelled = True
        if self._beginning is not None:
            self._beginning.cancel()
        if self._current is not None:
            self._current.cancel()
        self.span.cancel()

    def _begin_soon(self, delay: float) -> None:
        async def begin() -> None:
            self._current = await self._next_try(delay)

        self._beginning = asyncio.get_running_loop().create_task(begin())
        self._beginning.add_done_callback(retrieve)


def _cancellations() -> int:
    """Returns how many times the running task was cancelled.

    grpc.aio raises `asyncio.CancelledError` if the task is cancelled, and also if only the call is. If this number has not
    changed, only the call was cancelled. (A task that catches a cancellation and goes on keeps its number, so that comparing
    the number with 0 is not enough.)
    """
    task = asyncio.current_task()
    return 0 if task is None else task.cancelling()


def retrieve(task: asyncio.Task[Any]) -> None:
    """Retrieves the exception of an ended task, so that asyncio does not log it as never retrieved."""
    if not task.cancelled():
        task.exception()
