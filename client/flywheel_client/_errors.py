"""The exceptions of the client: one for each status that callers handle differently.

`flywheel/v1/generation.proto` defines the codes and their details, which follow google.rpc (AIP-193). The server always gives a
reason if it ends a call with INTERNAL or UNKNOWN. Proxies and gRPC itself use these two codes, without a reason, if a
connection broke. So INTERNAL and UNKNOWN without a reason become `UnavailableError`, whose `code` is the one that arrived.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, TypedDict, Unpack

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

REQUEST_ID_KEY: Final = "x-request-id"
STATUS_DETAILS_KEY: Final = "grpc-status-details-bin"


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """An invalid field of a request: its path, such as `stop[1]`, and the values that it accepts."""

    field: str
    description: str


@dataclass(frozen=True, slots=True)
class QuotaViolation:
    """A quota that the call exceeds: the caller who has the quota, and its limit."""

    subject: str
    description: str


class _Details(TypedDict, total=False):
    """The details that every error may have, as keyword arguments."""

    reason: str
    request_id: str
    retry_delay: float | None


class FlywheelError(Exception):
    """A call that did not end with OK. The class itself is for statuses without a class of their own.

    Attributes:
        code: The status code.
        message: The server's message.
        reason: The reason in the `ErrorInfo` of the status, such as `OVERLOADED`; empty if there is none.
        request_id: The id of the call in the server's log.
        retry_delay: The seconds after which the server asks to try again; None if it does not ask.
    """

    def __init__(
        self, code: grpc.StatusCode, message: str, *, reason: str = "", request_id: str = "", retry_delay: float | None = None
    ) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message
        self.reason = reason
        self.request_id = request_id
        self.retry_delay = retry_delay

    def __str__(self) -> str:
        return f"{self.code.name}: {self.message}"


class InvalidArgumentError(FlywheelError):
    """Fields of the request are out of range; repeating the call unchanged fails again.

    Attributes:
        violations: Every field that is out of range; empty if the server names none.
    """

    def __init__(
        self, code: grpc.StatusCode, message: str, *, violations: Iterable[FieldViolation] = (), **details: Unpack[_Details]
    ) -> None:
        super().__init__(code, message, **details)
        self.violations = list(violations)


class UnauthenticatedError(FlywheelError):
    """The call has no key, or a wrong key."""


class FailedPreconditionError(FlywheelError):
    """The deployment is not set up for this call; trying again helps only after the deployment was changed."""


class ResourceExhaustedError(FlywheelError):
    """The server is full, a quota is used up, or a message is larger than the transport allows (then without `retry_delay`).

    Attributes:
        quota_violations: The quotas that are used up; empty if the server names none.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        quota_violations: Iterable[QuotaViolation] = (),
        **details: Unpack[_Details],
    ) -> None:
        super().__init__(code, message, **details)
        self.quota_violations = list(quota_violations)


class DeadlineExceededError(FlywheelError):
    """The deadline passed; `reason` is `IN_QUEUE` or `IN_GENERATION`, or empty if the client noticed first."""


class UnavailableError(FlywheelError):
    """The server cannot be reached or is stopping, its engine is starting or cannot be reached, or the call broke off.

    For a client of a Modal app, this also means that no endpoint of the app is live.

    Attributes:
        code: UNAVAILABLE; or INTERNAL, UNKNOWN or CANCELLED if the call broke off between client and server, for example if a
            proxy has lost the server.
    """


class CallCancelledError(FlywheelError):
    """The call was cancelled: by `cancel()`, by closing the client, or by the server."""


class InternalError(FlywheelError):
    """The engine failed (`reason` is `ENGINE_FAILED`); the server's log has the cause, under the request id.

    If there is no reason, the answer was not a message of the contract, or there was no message.
    """


_ERROR_CLASSES: Final[dict[grpc.StatusCode, type[FlywheelError]]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgumentError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPreconditionError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhaustedError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.CANCELLED: CallCancelledError,
    grpc.StatusCode.INTERNAL: InternalError,
}

_DETAIL_TYPES: Final = (
    error_details_pb2.ErrorInfo,
    error_details_pb2.RetryInfo,
    error_details_pb2.BadRequest,
    error_details_pb2.QuotaFailure,
)


def error_from_status(
    code: grpc.StatusCode,
    message: str | None,
    trailing_metadata: Iterable[tuple[str, str | bytes]],
    request_id: str,
) -> FlywheelError:
    """Returns the exception for a status, with the google.rpc details in its trailing metadata."""
    details = list(_details(trailing_metadata))
    if code is grpc.StatusCode.DEADLINE_EXCEEDED and not details:
        # The client's own timer was first. grpc's message is then about streams, and not about the call.
        message = "The deadline passed before the call finished."
    kind = _ERROR_CLASSES.get(code, FlywheelError)
    if broke_off(code, message) and not any(map(_is_a_reason, details)):
        kind = UnavailableError
        message = f"The connection to the server broke, or something on the way ended the call: {message or 'no reason given'}"
    error = kind(code, message or "", request_id=request_id)
    for detail in details:
        match detail:
            case error_details_pb2.ErrorInfo():
                error.reason = detail.reason
            case error_details_pb2.RetryInfo():
                # ToTimedelta() would raise for a duration beyond the range of datetime.
                error.retry_delay = detail.retry_delay.seconds + detail.retry_delay.nanos / 1e9
            case error_details_pb2.BadRequest() if isinstance(error, InvalidArgumentError):
                error.violations = [FieldViolation(v.field, v.description) for v in detail.field_violations]
            case error_details_pb2.QuotaFailure() if isinstance(error, ResourceExhaustedError):
                error.quota_violations = [QuotaViolation(v.subject, v.description) for v in detail.violations]
    return error


def error_from_call(error: Any, request_id: str) -> FlywheelError:  # noqa: ANN401 - grpc has no public type for it
    """Returns the exception for an error of grpc; returns a `FlywheelError` unchanged."""
    if isinstance(error, FlywheelError):
        return error
    trailing_metadata = error.trailing_metadata() or ()
    # A refused call has only trailing metadata, so that proxies may retry it too.
    request_id = request_id_in(error.initial_metadata(), request_id_in(trailing_metadata, request_id))
    return error_from_status(error.code(), error.details(), trailing_metadata, request_id)


def broke_off(code: grpc.StatusCode, message: str | None) -> bool:
    """Returns whether a call with this status, and without a reason of the server, broke off between client and server.

    Only grpc's message tells a stream that was reset (RST_STREAM) from a cancelled one.
    """
    if code is grpc.StatusCode.CANCELLED:
        return "RST_STREAM" in (message or "")
    return code in {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN}


def unknown_status(request_id: str) -> FlywheelError:
    """Returns the exception for a status code that gRPC does not define, for which grpc.aio 1.73 raises `KeyError`."""
    return error_from_status(grpc.StatusCode.UNKNOWN, "the status is not one of gRPC", (), request_id)


def has_begun(error: Any) -> bool:  # noqa: ANN401 - grpc has no public type for it
    """Returns whether a failed call had received headers, which the server sends when the engine begins on the call.

    A refused call (Trailers-Only) has no headers, and neither has a proxy's answer with an HTTP status. grpc.aio loses the
    headers of a stream if the end of the stream arrives before the event loop has processed the headers.
    """
    return not isinstance(error, FlywheelError) and any(error.initial_metadata() or ())


def call_cancelled(request_id: str) -> CallCancelledError:
    """Returns the exception for a call that the client cancelled."""
    return CallCancelledError(grpc.StatusCode.CANCELLED, "the call was cancelled", request_id=request_id)


def deadline_exceeded(request_id: str) -> DeadlineExceededError:
    """Returns the exception for a call whose deadline passed before there was an endpoint to send it to."""
    message = "The deadline passed before the client found an endpoint for the call."
    return DeadlineExceededError(grpc.StatusCode.DEADLINE_EXCEEDED, message, request_id=request_id)


def no_connection(address: str, reason: str) -> UnavailableError:
    """Returns the exception for an address that did not answer a probe, with the message that grpc gives in this case."""
    message = f"failed to connect to all addresses; {address} does not answer: {reason}"
    return UnavailableError(grpc.StatusCode.UNAVAILABLE, message)


def request_id_in(metadata: Iterable[tuple[str, str | bytes]] | None, sent: str) -> str:
    """Returns the request id in the metadata; if there is none, returns the id that was sent."""
    for key, value in metadata or ():
        if key == REQUEST_ID_KEY and isinstance(value, str):
            return value
    return sent


def _is_a_reason(detail: Message) -> bool:
    """Returns whether a detail is a reason of the service itself. Reasons of proxies have other domains."""
    return isinstance(detail, error_details_pb2.ErrorInfo) and detail.domain in {"", "flywheel.v1"}


def _details(trailing_metadata: Iterable[tuple[str, str | bytes]]) -> Iterable[Message]:
    """Yields the known details of a status. Skips unreadable details, so that they do not hide the status."""
    status = status_pb2.Status()
    for key, value in trailing_metadata:
        if key == STATUS_DETAILS_KEY and isinstance(value, bytes):
            try:
                status.ParseFromString(value)
            except DecodeError:
                return
    for packed in status.details:
        for kind in _DETAIL_TYPES:
            if packed.Is(kind.DESCRIPTOR):
                try:
                    yield kind.FromString(packed.value)
                except DecodeError:
                    continue
