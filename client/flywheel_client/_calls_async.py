"""The counterpart of `_calls_sync` for asyncio. A channel belongs to one event loop."""

# ruff: noqa: ASYNC109 - each timeout becomes the deadline of a call, which the server obeys too

import asyncio
import random
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakSet

import grpc.aio

from flywheel_client._answers import marking_unreadable, require_message
from flywheel_client._errors import FlywheelError, call_cancelled, error_from_call, has_begun, request_id_in, unknown_status
from flywheel_client._pool import Member
from flywheel_client._retry import Retry, Tries

Metadata = Sequence[tuple[str, str | bytes]]


class AsyncRetryingChannel(ABC):
    """The part of `grpc.aio.Channel` that the clients and the generated stubs use, with retries."""

    grpc_waits: ClassVar[bool]
    """Whether grpc itself waits for a ready server. It can, if a server always comes back at the same address."""

    def __init__(self, retry: Retry | None) -> None:
        self.retry = retry
        self._closed = asyncio.get_running_loop().create_future()
        self._streams: WeakSet[_StreamCall] = WeakSet()

    def unary_unary(
        self,
        method: str,
        request_serializer: Callable[[Any], bytes],
        response_deserializer: Callable[[bytes], Any],
        **options: Any,  # noqa: ANN401 - the options of `grpc.aio.Channel`
    ) -> Callable[..., Coroutine[Any, Any, Any]]:
        """Returns a method whose answer is one message."""
        arguments = method, request_serializer, marking_unreadable(response_deserializer)
        return _Method(self, lambda channel: channel.unary_unary(*arguments, **options)).call

    def unary_stream(
        self,
        method: str,
        request_serializer: Callable[[Any], bytes],
        response_deserializer: Callable[[bytes], Any],
        **options: Any,  # noqa: ANN401 - the options of `grpc.aio.Channel`
    ) -> "Callable[..., _StreamCall]":
        """Returns a method whose answer is a stream."""
        arguments = method, request_serializer, marking_unreadable(response_deserializer)
        return _Method(self, lambda channel: channel.unary_stream(*arguments, **options)).stream

    def add_stream(self, call: "_StreamCall") -> None:
        """Makes `close` cancel the call, if the call still exists then."""
        self._streams.add(call)

    async def close(self) -> None:
        """Closes all channels, which cancels running calls and calls that wait for their next try."""
        if not self._closed.done():
            self._closed.set_result(None)
        # Older versions of grpcio, such as 1.73, do not end streams when their channel is closed.
        for stream in list(self._streams):
            stream.cancel()
        for channel in self._channels():
            await channel.close()

    @abstractmethod
    def _channels(self) -> Collection[grpc.aio.Channel]:
        """Returns all open channels."""

    @abstractmethod
    def pick_now(self, call: "AsyncCall") -> Member[grpc.aio.Channel] | None:
        """Returns the endpoint for the next try, which counts as in use until `release`; None if finding it has to wait."""

    @abstractmethod
    async def pick(self, call: "AsyncCall") -> Member[grpc.aio.Channel]:
        """Returns the endpoint for the next try, which counts as in use until `release`.

        Raises the call's error if there is no endpoint to try.
        """

    def release(self, member: Member[grpc.aio.Channel]) -> None:  # noqa: B027 - one target needs no record
        """Records the end of a try."""

    def record_failure(
        self,
        member: Member[grpc.aio.Channel],  # noqa: ARG002 - for directories
        call: "AsyncCall",  # noqa: ARG002
        error: grpc.aio.AioRpcError | FlywheelError,  # noqa: ARG002
    ) -> bool:
        """Records a failed try. Returns whether the endpoint is to blame, so that another one may be tried at once."""
        return False

    def delay(self, call: "AsyncCall", error: grpc.aio.AioRpcError | FlywheelError) -> float | None:
        """Returns the seconds until the next try of a failed call; None to give up and raise the error."""
        self.raise_if_closed(call)
        member = call.member
        to_blame = member is not None and self.record_failure(member, call, error)
        if has_begun(error):
            return None
        jitter = random.random()  # noqa: S311 - this is not a secret
        failure = error_from_call(error, call.request_id)
        return call.tries.delay(failure, time.monotonic(), jitter, tried=member is not None, to_blame=to_blame)

    async def pause(self, call: "AsyncCall", seconds: float) -> None:
        """Waits, or raises `CallCancelledError` as soon as the channel is closed."""
        if seconds:
            await asyncio.wait({self._closed}, timeout=seconds)
        self.raise_if_closed(call)

    def raise_if_closed(self, call: "AsyncCall") -> None:
        """Raises `CallCancelledError` if the channel was closed."""
        if self.is_closed:
            raise call_cancelled(call.request_id)

    @property
    def is_closed(self) -> bool:
        """Whether the channel was closed, which cancels its calls."""
        return self._closed.done()


class AsyncTargetChannel(AsyncRetryingChannel):
    """A channel to one target of gRPC. grpc itself finds the target's servers."""

    grpc_waits = True

    def __init__(self, target: str, channel: grpc.aio.Channel, retry: Retry | None) -> None:
        super().__init__(retry)
        self._member = Member(target, channel)

    def pick_now(self, call: "AsyncCall") -> Member[grpc.aio.Channel]:
        """Returns the target."""
        self.raise_if_closed(call)
        return self._member

    async def pick(self, call: "AsyncCall") -> Member[grpc.aio.Channel]:
        """Returns the target."""
        return self.pick_now(call)

    def _channels(self) -> Collection[grpc.aio.Channel]:
        return [self._member.channel]


class AsyncCall:
    """A call through all its tries."""

    def __init__(
        self, method: "_Method", request: object, timeout: float | None, metadata: Metadata, wait_for_ready: bool | None
    ) -> None:
        self._channel = method.channel
        self._bind = method.bind
        self._request = request
        self._metadata = metadata
        self._wait_for_ready = bool(wait_for_ready) and self._channel.grpc_waits
        waits = bool(wait_for_ready) and not self._channel.grpc_waits
        self.tries = Tries.begin(self._channel.retry, timeout, time.monotonic(), wait_for_ready=waits)
        self.request_id = request_id_in(metadata, "")
        self.member: Member[grpc.aio.Channel] | None = None
        """The endpoint of the current try; None if no endpoint was found."""

    async def _next_try(self, delay: float) -> Any:  # noqa: ANN401 - a call of grpc
        self.member = None
        await self._channel.pause(self, delay)
        return self._begin(await self._channel.pick(self))

    def _begin(self, member: Member[grpc.aio.Channel]) -> Any:  # noqa: ANN401 - a call of grpc
        self.member = member
        try:
            current = self._bind(member.channel)(
                self._request,
                timeout=self.tries.remaining(time.monotonic()),
                metadata=self._metadata,
                wait_for_ready=self._wait_for_ready,
            )
        except BaseException:
            self._channel.release(member)
            raise
        current.add_done_callback(lambda _: self._channel.release(member))
        return current


class _UnaryCall(AsyncCall):
    """A call whose answer is one message."""

    async def answer(self) -> Any:  # noqa: ANN401 - a message of the method
        """Returns the answer, as soon as it arrives."""
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

    def __init__(
        self, method: "_Method", request: object, timeout: float | None, metadata: Metadata, wait_for_ready: bool | None
    ) -> None:
        super().__init__(method, request, timeout, metadata, wait_for_ready)
        self._current: Any = None
        self._beginning: asyncio.Task[None] | None = None
        self._cancelled = False
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
                self.raise_if_cancelled()
                cancellations = _cancellations()
                try:
                    if messages is None:
                        messages = await self._messages()
                    message = await anext(messages)
                except StopAsyncIteration:
                    return
                except asyncio.CancelledError:
                    if _cancellations() == cancellations:
                        self.raise_if_cancelled()
                    raise
                except (grpc.aio.AioRpcError, FlywheelError) as error:
                    delay = self._channel.delay(self, error)
                    if delay is None or delivered:
                        raise
                    self.raise_if_cancelled()
                    messages = None
                    self._begin_soon(delay)
                except KeyError as error:
                    raise unknown_status(self.request_id) from error
                else:
                    delivered = True
                    yield require_message(message, self.request_id)
        finally:
            self.cancel()

    async def _messages(self) -> AsyncIterator[Any]:
        if self._beginning is not None:
            await self._beginning
        return aiter(self._current)

    def raise_if_cancelled(self) -> None:
        """Raises `CallCancelledError` if the call was cancelled, or the channel closed."""
        if self._cancelled or self._channel.is_closed:
            raise call_cancelled(self.request_id) from None

    async def initial_metadata(self) -> Metadata | None:
        """Returns the initial metadata of the endpoint. Call this after the first message has arrived."""
        metadata: Metadata | None = await self._current.initial_metadata()
        return metadata

    def cancel(self) -> None:
        """Ends the call: on its endpoint, between two tries, or while it waits for the directory."""
        self._cancelled = True
        if self._beginning is not None:
            self._beginning.cancel()
        if self._current is not None:
            self._current.cancel()

    def _begin_soon(self, delay: float) -> None:
        async def begin() -> None:
            self._current = await self._next_try(delay)

        self._beginning = asyncio.get_running_loop().create_task(begin())
        self._beginning.add_done_callback(retrieve)


@dataclass(frozen=True, slots=True)
class _Method:
    """A method of the service. `bind` returns grpc's own method on the channel of an endpoint."""

    channel: AsyncRetryingChannel
    bind: Callable[[grpc.aio.Channel], Callable[..., Any]]

    async def call(self, request: object, timeout: float | None, metadata: Metadata, wait_for_ready: bool | None = None) -> Any:  # noqa: ANN401 - a message of the method
        """Makes a call, and returns its answer."""
        return await _UnaryCall(self, request, timeout, metadata, wait_for_ready).answer()

    def stream(
        self, request: object, timeout: float | None, metadata: Metadata, wait_for_ready: bool | None = None
    ) -> _StreamCall:
        """Begins a call whose answer is a stream."""
        return _StreamCall(self, request, timeout, metadata, wait_for_ready)


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
