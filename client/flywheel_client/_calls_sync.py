"""Calls for threads."""

import sys
import threading
from abc import abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import grpc

from flywheel_client._calls import BaseCall, BaseChannel, Metadata, require_message
from flywheel_client._errors import FlywheelError
from flywheel_client._janitor import Janitor
from flywheel_client._pool import Member
from flywheel_client._retry import Retry
from flywheel_client._tracing import NO_SPAN

T = TypeVar("T")

CLOSE_TIMEOUT: Final = 1.0
"""Seconds that `close` waits. Without a limit, a finalizer in grpc's own thread would wait for itself forever."""


class _Thread(threading.local):
    """State of the current thread."""

    in_call = False
    """Whether the thread is inside a call of any client.

    grpc and OpenTelemetry may then hold locks, and all channels share one lock of grpc.
    """


_thread: Final = _Thread()


def require_not_in_call() -> None:
    """Raises `RuntimeError` if the thread is inside a call. A handler that waits for another call would then wait forever."""
    if _thread.in_call:
        raise RuntimeError(
            "reentrant call: a signal handler or finalizer that interrupts a call cannot make another; "
            "make it in a thread, for which the handler does not wait"
        )


class RetryingChannel(BaseChannel[grpc.Channel]):
    """The part of `grpc.Channel` that the clients and the generated stubs use, with retries.

    This class never calls grpc while it holds its own lock: grpc has locks too, and calls back. Signal handlers and finalizers
    may cancel calls and close the channel at any time: that only sets flags, and the janitor's thread does the rest.
    """

    def __init__(self, retry: Retry | None) -> None:
        super().__init__(retry)
        self._changed = threading.Condition()
        self._close_done = threading.Event()
        self.janitor = Janitor()

    def _unary(self, method: str, bind: Callable[[grpc.Channel], Any]) -> Callable[..., Any]:
        return _Method(self, method, lambda channel: bind(channel).future)

    def _stream(self, method: str, bind: Callable[[grpc.Channel], Any]) -> Callable[..., Any]:
        return _Method(self, method, bind)

    def close(self) -> None:
        """Closes all channels, which cancels running calls and calls that wait for their next try.

        Returns when the channels are closed. In a signal handler or finalizer that interrupted a call, returns at once: closing
        waits for the interrupted call, which continues only after this method has returned.
        """
        self.is_closed = True
        self.janitor.run_soon(self._close)
        self.janitor.end()
        if not _thread.in_call and not sys.is_finalizing():
            self._close_done.wait(CLOSE_TIMEOUT)

    def _close(self) -> None:
        with self._changed:
            channels = self._channels()
            self._changed.notify_all()
        with ExitStack() as closing:
            closing.callback(self._close_done.set)
            # An error in one channel does not keep the others open.
            for channel in channels:
                closing.callback(channel.close)

    @abstractmethod
    def pick(self, call: "Call") -> Member[grpc.Channel]:
        """Returns the endpoint for the next try, which counts as in use until `release`.

        Raises the call's error if there is no endpoint to try.
        """

    def pause(self, call: "Call", seconds: float) -> None:
        """Waits, or raises `CallCancelledError` as soon as the call is cancelled or the channel closed."""
        with self._changed:
            seconds = min(seconds, threading.TIMEOUT_MAX)
            self._changed.wait_for(lambda: call.cancelled or self.is_closed, seconds)
            self.raise_if_cancelled(call)

    def wake(self) -> None:
        """Wakes waiting calls, so that they see that they were cancelled."""
        with self._changed:
            self._changed.notify_all()


class TargetChannel(RetryingChannel):
    """A channel to one target of gRPC. grpc itself finds the target's servers."""

    grpc_waits = True

    def __init__(self, target: str, channel: grpc.Channel, retry: Retry | None) -> None:
        super().__init__(retry)
        self._member = Member(target, channel)

    def pick(self, call: "Call") -> Member[grpc.Channel]:
        """Returns the target."""
        self.raise_if_cancelled(call)
        return self._member

    def _channels(self) -> list[grpc.Channel]:
        return [self._member.channel]


@dataclass(frozen=True, slots=True)
class _Method:
    """A method of the service. `bind` returns grpc's own method on the channel of an endpoint."""

    channel: RetryingChannel
    method: str
    bind: Callable[[grpc.Channel], Callable[..., Any]]

    def __call__(self, request: object, **options: Any) -> "Call":  # noqa: ANN401 - the options of `BaseCall`
        return Call(self.channel, self.method, self.bind, request, **options)

    future = __call__


class Call(BaseCall[grpc.Channel]):
    """A call through all its tries. Its answer is one message or a stream."""

    _current: Any = None
    _ended = False

    def __init__(self, channel: RetryingChannel, *arguments: Any, **options: Any) -> None:  # noqa: ANN401 - the arguments of `BaseCall`
        self._channel = channel
        self._delivered = False
        self._error: Exception | None = None

        def start() -> None:
            super(Call, self).__init__(channel, *arguments, **options)
            self._begin()

        self._in_call(start)

    def __next__(self) -> Any:  # noqa: ANN401 - a message of the method
        try:
            return self._in_call(lambda: self._receive_traced(next))
        except StopIteration:
            self._ended = True
            raise

    def result(self) -> Any:  # noqa: ANN401 - a message of the method
        """Returns the answer of a call with one message, as soon as it arrives."""

        def receive() -> Any:  # noqa: ANN401 - as above
            message = self._receive_traced(lambda call: call.result())
            self.span.end()
            return message

        message = self._in_call(receive)
        self._ended = True
        return message

    def initial_metadata(self) -> Metadata | None:
        """Returns the initial metadata of the endpoint. Call this after the first message has arrived."""
        metadata: Metadata | None = self._in_call(self._current.initial_metadata)
        return metadata

    def cancel(self) -> None:
        """Ends the call: on its endpoint, between two tries, or while it waits for the directory."""
        self.cancelled = True
        self._channel.janitor.run_soon(self._cancel)

    def _cancel(self) -> None:
        # `cancel` sets `cancelled` and then this reads `_current`; `_try` sets `_current` and then reads `cancelled`. So at
        # least one of the two threads sees the other's value, and cancels grpc's call.
        current = self._current
        if current is None:
            self._channel.wake()
        else:
            current.cancel()
        self.span.cancel()

    def __del__(self) -> None:
        if self.span is not NO_SPAN and not self._ended:
            self._channel.janitor.run_soon(self.span.cancel)
        # An interrupt may drop the call before its caller holds it. grpc's own call stays alive through its callbacks.
        if self._current is not None and not self._ended:
            self._channel.janitor.run_soon(self._current.cancel)

    def _receive_traced(self, receive: Callable[[Any], Any]) -> Any:  # noqa: ANN401 - a message of the method
        """Receives a message, and notes in the span that it has arrived, or how the call has ended."""
        try:
            message = self._receive(receive)
        except StopIteration:
            self.span.end()
            raise
        except BaseException as error:
            self.span.end(error)
            raise
        self.span.receive(message)
        return message

    def _in_call(self, function: Callable[[], T]) -> T:
        """Runs a function that may take locks of grpc or OpenTelemetry.

        Raises `RuntimeError` if the thread may hold such locks already.
        """
        require_not_in_call()
        try:
            _thread.in_call = True
            return function()
        finally:
            _thread.in_call = False

    def _receive(self, receive: Callable[[Any], Any]) -> Any:  # noqa: ANN401 - a message of the method
        while True:
            # Until the janitor has cancelled grpc's call, grpc would still return messages that have arrived.
            self._channel.raise_if_cancelled(self)
            try:
                if self._error is not None:
                    raise self._error
                message = receive(self._current)
            except (grpc.RpcError, FlywheelError) as error:
                delay = self._channel.delay(self, error)
                if delay is None or self._delivered:
                    raise
            else:
                self._delivered = True
                return require_message(message, self.request_id)
            self._current = None
            self._channel.pause(self, delay)
            self._begin()

    def _begin(self) -> None:
        self._current = self._error = self.member = None
        try:
            self._try()
        except (grpc.RpcError, FlywheelError) as error:
            # As in grpc, a call raises its error only when its result is asked for.
            self._error = error

    def _try(self) -> None:
        self.member = member = self._channel.pick(self)
        try:
            current = self._send(member.channel)
        except BaseException:
            self._channel.release(member)
            # grpc raises a ValueError if the channel was closed after `pick`.
            self._channel.raise_if_cancelled(self)
            raise
        self._current = current
        # grpc keeps the callback alive, so the callback must not hold this call.
        current.add_done_callback(lambda _, channel=self._channel: channel.release(member))
        if self.cancelled:
            current.cancel()
