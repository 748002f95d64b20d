"""The part of calls and their retries that is the same for threads (`_calls_sync`) and asyncio (`_calls_async`).

The client retries a call within its deadline if the engine has not begun on the call. `_retry` decides whether and when. A call
that has delivered a message is never repeated: the caller may have used the message.
"""

import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import Any, ClassVar, Final, Generic, TypeVar

import grpc
from google.protobuf.message import DecodeError

from flywheel_client._errors import FlywheelError, InternalError, call_cancelled, error_from_call, has_begun, request_id_in
from flywheel_client._pool import Member
from flywheel_client._retry import Retry, Tries
from flywheel_client._tracing import NO_SPAN, CallSpan, start_span

ChannelT = TypeVar("ChannelT")
Metadata = Sequence[tuple[str, str | bytes]]

_UNREADABLE: Final = object()
"""Takes the place of an unreadable message, so that both clients raise the same error for it.

If a deserializer raises, grpc ends the call with INTERNAL but leaves it open on the wire, and grpc.aio returns None.
"""


class BaseCall(Generic[ChannelT]):
    """A call through all its tries."""

    span: CallSpan = NO_SPAN
    """The span of the call; `NO_SPAN` unless the program uses OpenTelemetry."""

    def __init__(
        self,
        channel: "BaseChannel[ChannelT]",
        method: str,
        bind: Callable[[ChannelT], Callable[..., Any]],
        request: object,
        *,
        timeout: float | None,
        metadata: Metadata,
        wait_for_ready: bool | None = None,
    ) -> None:
        self._bind = bind
        self._request = request
        self.span = start_span(method, request, metadata)
        self._metadata = (*metadata, *self.span.headers)
        self._wait_for_ready = bool(wait_for_ready) and channel.grpc_waits
        waits = bool(wait_for_ready) and not channel.grpc_waits
        self.tries = Tries.begin(channel.retry, timeout, time.monotonic(), wait_for_ready=waits)
        self.request_id = request_id_in(metadata, "")
        self.cancelled = False
        self.member: Member[ChannelT] | None = None
        """The endpoint of the current try; None if no endpoint was found."""

    def _send(self, channel: ChannelT) -> Any:  # noqa: ANN401 - a call of grpc
        """Begins a try on the channel of an endpoint."""
        remaining = self.tries.remaining(time.monotonic())
        return self._bind(channel)(
            self._request, timeout=remaining, metadata=self._metadata, wait_for_ready=self._wait_for_ready
        )


class BaseChannel(ABC, Generic[ChannelT]):
    """The part of a channel of grpc that the clients and the generated stubs use, with retries."""

    grpc_waits: ClassVar[bool]
    """Whether grpc itself waits for a ready server. It can, if a server always comes back at the same address."""

    def __init__(self, retry: Retry | None) -> None:
        self.retry = retry
        self.is_closed = False

    def unary_unary(
        self,
        method: str,
        request_serializer: Callable[[Any], bytes],
        response_deserializer: Callable[[bytes], Any],
        **options: Any,  # noqa: ANN401 - the options of a channel of grpc
    ) -> Callable[..., Any]:
        """Returns a method whose answer is one message."""
        arguments = method, request_serializer, _marking_unreadable(response_deserializer)
        return self._unary(method, lambda channel: channel.unary_unary(*arguments, **options))

    def unary_stream(
        self,
        method: str,
        request_serializer: Callable[[Any], bytes],
        response_deserializer: Callable[[bytes], Any],
        **options: Any,  # noqa: ANN401 - the options of a channel of grpc
    ) -> Callable[..., Any]:
        """Returns a method whose answer is a stream."""
        arguments = method, request_serializer, _marking_unreadable(response_deserializer)
        return self._stream(method, lambda channel: channel.unary_stream(*arguments, **options))

    @abstractmethod
    def _unary(self, method: str, bind: Callable[[Any], Any]) -> Callable[..., Any]:
        """Returns a method whose answer is one message. `bind` returns grpc's own method on the channel of an endpoint."""

    @abstractmethod
    def _stream(self, method: str, bind: Callable[[Any], Any]) -> Callable[..., Any]:
        """Returns a method whose answer is a stream. `bind` is as in `_unary`."""

    @abstractmethod
    def _channels(self) -> Collection[ChannelT]:
        """Returns all open channels."""

    def release(self, member: Member[ChannelT]) -> None:
        """Records the end of a try. A channel to one target needs no record."""

    def record_failure(self, member: Member[ChannelT], tries: Tries, error: grpc.RpcError | FlywheelError) -> bool:  # noqa: ARG002 - for directories
        """Records a failed try. Returns whether the endpoint is to blame, so that another one may be tried at once."""
        return False

    def delay(self, call: BaseCall[ChannelT], error: grpc.RpcError | FlywheelError) -> float | None:
        """Returns the seconds until the next try of a failed call; None to give up and raise the error."""
        self.raise_if_cancelled(call)
        member = call.member
        to_blame = member is not None and self.record_failure(member, call.tries, error)
        if has_begun(error):
            return None
        jitter = random.random()  # noqa: S311 - this is not a secret
        failure = error_from_call(error, call.request_id)
        delay = call.tries.delay(failure, time.monotonic(), jitter, tried=member is not None, to_blame=to_blame)
        if delay is not None:
            call.span.retry(error)
        return delay

    def raise_if_cancelled(self, call: BaseCall[ChannelT]) -> None:
        """Raises `CallCancelledError` if the call was cancelled, or the channel closed."""
        if call.cancelled or self.is_closed:
            raise call_cancelled(call.request_id) from None


def _marking_unreadable(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def read(data: bytes) -> Any:  # noqa: ANN401 - a message of the method, or the mark
        try:
            return deserialize(data)
        except (DecodeError, ValueError):
            # Protobuf in pure Python raises UnicodeDecodeError, a ValueError, if a text is not UTF-8.
            return _UNREADABLE

    return read


def require_message(message: Any, request_id: str) -> Any:  # noqa: ANN401 - a message of the method
    """Returns the message; raises `InternalError` if it is unreadable, or if the call ended with OK but without a message."""
    if message is _UNREADABLE:
        raise InternalError(grpc.StatusCode.INTERNAL, "the server's answer is no message of this method", request_id=request_id)
    if message is None:
        raise InternalError(grpc.StatusCode.INTERNAL, "the server ended the call without an answer", request_id=request_id)
    return message
