"""Calls for threads, which are tried again within their deadline if the engine has not begun on them.

`_retry` decides whether and when. What has delivered something is never repeated, because the caller may have used it.
"""

import random
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar, Final, TypeVar

import grpc

from flywheel_client._answers import marking_unreadable, require_message
from flywheel_client._errors import FlywheelError, call_cancelled, error_from_call, has_begun, request_id_in
from flywheel_client._janitor import Janitor
from flywheel_client._pool import Member
from flywheel_client._retry import Retry, Tries

T = TypeVar("T")
Metadata = Sequence[tuple[str, str | bytes]]

CLOSE_TIMEOUT: Final = 1.0
"""Seconds that closing a channel is waited for. Where a finalizer runs in grpc's own thread, it could never end."""


class _Thread(threading.local):
    """What is known of the thread that asks."""

    in_call = False
    """Whether it is inside a call, of any client: grpc may hold locks for it, one of which all channels share."""


_thread: Final = _Thread()


class RetryingChannel(ABC):
    """What the clients and the generated stubs use of a `grpc.Channel`.

    Nothing of grpc is called while the lock is held: grpc has locks of its own, and calls back. Calls may be cancelled, and the
    channel closed, at any moment, also in a signal handler or a finalizer: that only sets flags, and the janitor does the rest.
    """

    grpc_waits: ClassVar[bool]
    """Whether waiting for a server to be ready is left to grpc, which does it if a server comes back to its address."""

    def __init__(self, retry: Retry | None) -> None:
        self.retry = retry
        self._changed = threading.Condition()
        self._closed = False
        self._close_done = threading.Event()
        self.janitor = Janitor()

    def unary_unary(
        self,
        method: str,
        request_serializer: Callable[[Any], bytes],
        response_deserializer: Callable[[bytes], Any],
        **options: Any,  # noqa: ANN401 - those of `grpc.Channel`
    ) -> "_Method":
        """Returns a method that is answered with one message."""
        arguments = method, request_serializer, marking_unreadable(response_deserializer)
        return _Method(self, lambda channel: channel.unary_unary(*arguments, **options).future)

    def unary_stream(
        self,
        method: str,
        request_serializer: Callable[[Any], bytes],
        response_deserializer: Callable[[bytes], Any],
        **options: Any,  # noqa: ANN401 - those of `grpc.Channel`
    ) -> "_Method":
        """Returns a method that is answered with a stream."""
        arguments = method, request_serializer, marking_unreadable(response_deserializer)
        return _Method(self, lambda channel: channel.unary_stream(*arguments, **options))

    def close(self) -> None:
        """Closes all channels, which cancels the calls under way and those that wait for their next try.

        Returns when they are closed, but at once in a signal handler or a finalizer that interrupted a call: closing waits for
        that call, which goes on only after this has returned.
        """
        self._closed = True
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
            # Each is closed, whatever becomes of the others.
            for channel in channels:
                closing.callback(channel.close)

    @abstractmethod
    def _channels(self) -> Collection[grpc.Channel]:
        """Returns all that are open."""

    @abstractmethod
    def pick(self, call: "Call") -> Member[grpc.Channel]:
        """Returns the endpoint to try next, which counts as in use until `release`.

        Raises what the call ends with if there is none.
        """

    def release(self, member: Member[grpc.Channel]) -> None:  # noqa: B027 - nothing to note by default
        """Notes that a try is over."""

    def record_failure(self, member: Member[grpc.Channel], call: "Call", error: grpc.RpcError | FlywheelError) -> bool:  # noqa: ARG002 - for directories
        """Notes that a try of a call failed there, and returns whether another endpoint may do better at once."""
        return False

    def delay(self, call: "Call", error: grpc.RpcError | FlywheelError) -> float | None:
        """Returns the seconds until the next try of a call that failed; None if there is to be none."""
        self.raise_if_cancelled(call)
        member = call.member
        to_blame = member is not None and self.record_failure(member, call, error)
        if has_begun(error):
            return None
        jitter = random.random()  # noqa: S311 - nothing secret
        failure = error_from_call(error, call.request_id)
        return call.tries.delay(failure, time.monotonic(), jitter, tried=member is not None, to_blame=to_blame)

    def pause(self, call: "Call", seconds: float) -> None:
        """Waits so long, or raises `CallCancelledError` as soon as the call is cancelled or the channel closed."""
        with self._changed:
            seconds = min(seconds, threading.TIMEOUT_MAX)
            self._changed.wait_for(lambda: call.cancelled or self._closed, seconds)
            self.raise_if_cancelled(call)

    def raise_if_cancelled(self, call: "Call") -> None:
        """Raises `CallCancelledError` if the call was cancelled, or the channel closed."""
        if call.cancelled or self._closed:
            raise call_cancelled(call.request_id)

    def wake(self) -> None:
        """Lets calls that wait see that they were cancelled."""
        with self._changed:
            self._changed.notify_all()


class TargetChannel(RetryingChannel):
    """A channel to one target, where grpc finds the servers."""

    grpc_waits = True

    def __init__(self, target: str, channel: grpc.Channel, retry: Retry | None) -> None:
        super().__init__(retry)
        self._member = Member(target, channel)

    def pick(self, call: "Call") -> Member[grpc.Channel]:
        """Returns the target."""
        self.raise_if_cancelled(call)
        return self._member

    def _channels(self) -> Collection[grpc.Channel]:
        return [self._member.channel]


@dataclass(frozen=True, slots=True)
class _Method:
    """A method of the service, on whichever endpoint a call of it goes to."""

    channel: RetryingChannel
    bind: Callable[[grpc.Channel], Callable[..., Any]]

    def __call__(
        self, request: object, timeout: float | None, metadata: Metadata, wait_for_ready: bool | None = None
    ) -> "Call":
        return Call(self, request, timeout, metadata, wait_for_ready)

    future = __call__


class Call:
    """What the client uses of a call of grpc, be its answer one message or a stream."""

    _current: Any = None
    _ended = False

    def __init__(
        self, method: _Method, request: object, timeout: float | None, metadata: Metadata, wait_for_ready: bool | None
    ) -> None:
        self._channel = method.channel
        self._bind = method.bind
        self._request = request
        self._metadata = metadata
        self._wait_for_ready = bool(wait_for_ready) and self._channel.grpc_waits
        waits = bool(wait_for_ready) and not self._channel.grpc_waits
        self.tries = Tries.begin(self._channel.retry, timeout, time.monotonic(), wait_for_ready=waits)
        self.request_id = request_id_in(metadata, "")
        self.cancelled = False
        self.member: Member[grpc.Channel] | None = None
        """Where the call is; None if it has found no endpoint."""
        self._delivered = False
        self._error: Exception | None = None
        self._in_call(self._begin)

    def __next__(self) -> Any:  # noqa: ANN401 - a message of the method
        try:
            return self._in_call(lambda: self._receive(next))
        except StopIteration:
            self._ended = True
            raise

    def result(self) -> Any:  # noqa: ANN401 - a message of the method
        """Waits for the answer."""
        message = self._in_call(lambda: self._receive(lambda call: call.result()))
        self._ended = True
        return message

    def initial_metadata(self) -> Metadata | None:
        """Returns what the endpoint sent before its first message; call it after that has arrived."""
        metadata: Metadata | None = self._in_call(self._current.initial_metadata)
        return metadata

    def cancel(self) -> None:
        """Ends the call wherever it is: on an endpoint, between two tries, or waiting for the directory."""
        self.cancelled = True
        self._channel.janitor.run_soon(self._cancel)

    def _cancel(self) -> None:
        # This reads what `_try` sets, and `cancelled` was set before, in the opposite order, so that one of the two sees what
        # the other has set.
        current = self._current
        if current is None:
            self._channel.wake()
        else:
            current.cancel()

    def __del__(self) -> None:
        # For example if an interrupt comes before anybody holds the call. One of grpc is kept by its callbacks.
        if self._current is not None and not self._ended:
            self._channel.janitor.run_soon(self._current.cancel)

    def _in_call(self, function: Callable[[], T]) -> T:
        """Runs what holds locks of grpc; raises `RuntimeError` if the thread holds some already."""
        if _thread.in_call:
            raise RuntimeError(
                "reentrant call: a signal handler or finalizer that interrupts a call cannot make another; "
                "make it in a thread, for which the handler does not wait"
            )
        try:
            _thread.in_call = True
            return function()
        finally:
            _thread.in_call = False

    def _receive(self, receive: Callable[[Any], Any]) -> Any:  # noqa: ANN401 - a message of the method
        while True:
            # Messages may have arrived that grpc would hand on, until the janitor has cancelled its call.
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
            # As with grpc, a call that fails says so when it is asked for its result.
            self._error = error

    def _try(self) -> None:
        self.member = member = self._channel.pick(self)
        try:
            current = self._bind(member.channel)(
                self._request,
                timeout=self.tries.remaining(time.monotonic()),
                metadata=self._metadata,
                wait_for_ready=self._wait_for_ready,
            )
        except BaseException:
            self._channel.release(member)
            # Closing the channel between the two lines makes grpc raise a ValueError.
            self._channel.raise_if_cancelled(self)
            raise
        self._current = current
        # grpc keeps the callback, so that it must not keep this call.
        current.add_done_callback(lambda _, channel=self._channel: channel.release(member))
        if self.cancelled:
            current.cancel()
