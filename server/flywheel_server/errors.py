"""Maps each exception to the status that its call ends with: code, message and google.rpc details (AIP-193).

    exception                  status              details
    InvalidRequestError        INVALID_ARGUMENT    BadRequest with every violation, as far as they are not too many; ErrorInfo
                                                   UNSUPPORTED_FIELD if the engine does not support a field
    PromptTooLongError         INVALID_ARGUMENT    BadRequest with both numbers
    InvalidFieldError          INVALID_ARGUMENT    BadRequest as for InvalidRequestError
    UnsupportedFieldError      INVALID_ARGUMENT    BadRequest, ErrorInfo UNSUPPORTED_FIELD
    UnknownFieldError          INVALID_ARGUMENT    BadRequest, ErrorInfo UNKNOWN_FIELD with the number of the field
    MalformedRequestError      INVALID_ARGUMENT    ErrorInfo MALFORMED_REQUEST
    RequestTooLargeError       RESOURCE_EXHAUSTED  ErrorInfo REQUEST_TOO_LARGE
    MetadataTooLargeError      RESOURCE_EXHAUSTED  ErrorInfo METADATA_TOO_LARGE
    IncompleteRequestError     DEADLINE_EXCEEDED   ErrorInfo REQUEST_INCOMPLETE
    ServerFullError            RESOURCE_EXHAUSTED  RetryInfo, ErrorInfo OVERLOADED
    EngineOverloadedError      RESOURCE_EXHAUSTED  RetryInfo, ErrorInfo OVERLOADED
    QuotaExceededError         RESOURCE_EXHAUSTED  QuotaFailure, ErrorInfo QUOTA_EXCEEDED, and a RetryInfo if a retry helps
    SlowReaderError            RESOURCE_EXHAUSTED  ErrorInfo SLOW_READER
    DeadlineExceededError      DEADLINE_EXCEEDED   ErrorInfo IN_QUEUE or IN_GENERATION
    EngineTimeoutError         DEADLINE_EXCEEDED   ErrorInfo ENGINE_TIMEOUT with the seconds
    UnauthenticatedError       UNAUTHENTICATED     ErrorInfo API_KEY_MISSING, _INVALID, _EXPIRED or _REVOKED, or
                                                   CERTIFICATE_INVALID
    EngineSetupError           FAILED_PRECONDITION ErrorInfo ENGINE_NOT_SET_UP with what was looked for, and the setting
    UnsupportedMethodError     UNIMPLEMENTED       ErrorInfo UNSUPPORTED_METHOD
    EngineUnavailableError     UNAVAILABLE         RetryInfo, ErrorInfo ENGINE_UNAVAILABLE
    an error due to a shortage UNAVAILABLE         RetryInfo, ErrorInfo OUT_OF_RESOURCES; see `flywheel_server.system.shortage`
    anything else              INTERNAL            ErrorInfo ENGINE_FAILED with the request id

With a RetryInfo, the metadata `grpc-retry-pushback-ms` tells gRPC's own retries the same delay (gRFC A6).

Messages say what the caller can do. Engine internals and stack traces are only in the log. The text of a prompt is in neither.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import status_pb2
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, QuotaFailure, RetryInfo
from grpc import StatusCode

from flywheel_server.engines.base import (
    EngineFailedError,
    EngineOverloadedError,
    EngineSetupError,
    EngineTimeoutError,
    EngineUnavailableError,
    InvalidFieldError,
    PromptTooLongError,
    UnsupportedFieldError,
    UnsupportedMethodError,
)
from flywheel_server.messages import FieldViolation, InvalidRequestError
from flywheel_server.system.shortage import is_shortage
from flywheel_server.violations import reported, summary

DOMAIN: Final = "flywheel.v1"
DETAILS_KEY: Final = "grpc-status-details-bin"
PUSHBACK_KEY: Final = "grpc-retry-pushback-ms"
SHORTAGE_RETRY_DELAY: Final = 1.0
"""Seconds until a retry after a shortage: a guess, as nobody knows how long the shortage lasts."""


class MalformedRequestError(ValueError):
    """The request is not a valid message of its type, or has text that is not UTF-8."""


class _TooLargeError(ValueError):
    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self.limit = limit


class UnknownFieldError(ValueError):
    """The request has fields that this server does not know, or knows with another type.

    Attributes:
        fields: For each of them, the path of the message that has the field, and the field's number.
        names: The names of those that the server knows with another type.
    """

    def __init__(self, fields: Sequence[tuple[str, int]], names: Mapping[tuple[str, int], str]) -> None:
        super().__init__(fields, names)
        self.fields = fields
        self.names = names


class RequestTooLargeError(_TooLargeError):
    """The request has more than `limit` bytes after decompression."""


class MetadataTooLargeError(_TooLargeError):
    """The call has more than `limit` bytes of metadata, as HTTP/2 counts them."""


class IncompleteRequestError(TimeoutError):
    """The request did not arrive in time."""


class DeadlineExceededError(TimeoutError):
    """The caller's deadline passed. `reason` says whether the generation was still in the queue."""

    def __init__(self, reason: Literal["IN_QUEUE", "IN_GENERATION"]) -> None:
        super().__init__(reason)
        self.reason = reason


class ServerFullError(Exception):
    """The server has no place for the call. `retry_delay` is the seconds until it should have one."""

    def __init__(self, retry_delay: float) -> None:
        super().__init__(retry_delay)
        self.retry_delay = retry_delay


class QuotaExceededError(Exception):
    """The call exceeds a quota of its caller. `retry_delay` is the seconds until it fits; None if it never does."""

    def __init__(self, caller: str, quota: str, retry_delay: float | None) -> None:
        super().__init__(caller, quota, retry_delay)
        self.caller = caller
        self.quota = quota
        self.retry_delay = retry_delay


class SlowReaderError(Exception):
    """The caller does not read its stream fast enough."""


UnauthenticatedReason = Literal[
    "API_KEY_MISSING", "API_KEY_INVALID", "API_KEY_EXPIRED", "API_KEY_REVOKED", "CERTIFICATE_INVALID"
]


class UnauthenticatedError(PermissionError):
    """The call has no API key, or an API key or certificate that is not accepted."""

    def __init__(self, reason: UnauthenticatedReason) -> None:
        super().__init__(reason)
        self.reason: UnauthenticatedReason = reason


@dataclass(frozen=True, slots=True)
class CallStatus:
    """How a call ends: the status code, its message, and the google.rpc details."""

    code: StatusCode
    message: str
    details: tuple[Message, ...]

    @property
    def reason(self) -> str:
        """The reason in the ErrorInfo; empty if there is none."""
        return next((detail.reason for detail in self.details if isinstance(detail, ErrorInfo)), "")

    @property
    def retry_delay(self) -> float | None:
        """The seconds in the RetryInfo; None if there is none."""
        delays = (detail.retry_delay for detail in self.details if isinstance(detail, RetryInfo))
        return next((delay.ToNanoseconds() / 1e9 for delay in delays), None)

    def trailing_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """Returns trailing metadata with the details, packed in a google.rpc.Status, and any retry pushback."""
        status = status_pb2.Status(code=self.code.value[0], message=self.message)
        pushback: tuple[tuple[str, str], ...] = ()
        for detail in self.details:
            packed = AnyMessage()
            packed.Pack(detail)
            status.details.append(packed)
            if isinstance(detail, RetryInfo):
                pushback = ((PUSHBACK_KEY, str(detail.retry_delay.ToMilliseconds())),)
        return ((DETAILS_KEY, status.SerializeToString()), *pushback)


def _bad_request(violations: Sequence[FieldViolation]) -> BadRequest:
    return BadRequest(
        field_violations=[
            BadRequest.FieldViolation(field=violation.field, description=violation.description) for violation in violations
        ]
    )


def _error_info(reason: str, **metadata: str) -> ErrorInfo:
    return ErrorInfo(reason=reason, domain=DOMAIN, metadata=metadata)


def _retry_info(seconds: float) -> RetryInfo:
    delay = Duration()
    delay.FromNanoseconds(round(seconds * 1e9))
    return RetryInfo(retry_delay=delay)


def _invalid_request(error: InvalidRequestError, _: str) -> CallStatus:
    named = reported(error.violations)
    message = f"Invalid request: {summary(named, len(error.violations))}."
    info = (_error_info("UNSUPPORTED_FIELD", field=error.unsupported[0]),) if error.unsupported else ()
    return CallStatus(StatusCode.INVALID_ARGUMENT, message, (_bad_request(named), *info))


def _prompt_too_long(error: PromptTooLongError, _: str) -> CallStatus:
    length = f"{'' if error.is_exact else 'at least '}{error.prompt_tokens}"
    if not error.is_generation:
        description = (
            f"is {length} tokens long, and must leave room for a token in the context of {error.context_tokens} tokens."
        )
        violation = FieldViolation(error.field, f"{description} Shorten it.")
    elif error.prompt_tokens >= error.context_tokens:
        violation = FieldViolation(
            error.field,
            f"is {length} tokens long, which with max_tokens {error.max_tokens} exceeds the context of "
            f"{error.context_tokens} tokens. Shorten it or set max_input_tokens.",
        )
    else:
        violation = FieldViolation(
            "max_tokens",
            f"with {length} prompt tokens must be at most {error.context_tokens - error.prompt_tokens}, but is "
            f"{error.max_tokens}: both must fit the context of {error.context_tokens} tokens. Shorten the prompt, lower "
            "max_tokens, or set max_input_tokens.",
        )
    too_long = "Prompt and max_tokens exceed" if error.is_generation else "The prompt exceeds"
    message = f"{too_long} the context: {violation.field} {violation.description}"
    return CallStatus(StatusCode.INVALID_ARGUMENT, message, (_bad_request([violation]),))


def _unsupported_field(error: UnsupportedFieldError, _: str) -> CallStatus:
    names = [error.field, *error.further]
    return CallStatus(
        StatusCode.INVALID_ARGUMENT,
        f"This engine does not support {', '.join(names)}: {error.reason}.",
        (
            _bad_request([FieldViolation(name, f"is not supported: {error.reason}") for name in names]),
            _error_info("UNSUPPORTED_FIELD", field=error.field),
        ),
    )


def _invalid_field(error: InvalidFieldError, request_id: str) -> CallStatus:
    return _invalid_request(InvalidRequestError(error.violations), request_id)


def _unknown_field(error: UnknownFieldError, _: str) -> CallStatus:
    violations = []
    for path, number in error.fields:
        name = error.names.get((path, number))
        description = "is a field that this server does not know" if name is None else "has another type than this server knows"
        violations.append(FieldViolation(f"{path}{'.' if path else ''}{name or number}", description))
    field = violations[0].field
    message = f"This server does not know the field {field}. GetModel returns the fields that the server supports."
    if error.fields[0] in error.names:
        message = f"The field {field} has another type than this server knows. Compare your contract with the server's."
    info = _error_info("UNKNOWN_FIELD", field=str(error.fields[0][1]))
    return CallStatus(StatusCode.INVALID_ARGUMENT, message, (_bad_request(violations), info))


def _unsupported_method(error: UnsupportedMethodError, _: str) -> CallStatus:
    message = f"This engine does not support the method {error}."
    return CallStatus(StatusCode.UNIMPLEMENTED, message, (_error_info("UNSUPPORTED_METHOD"),))


def _malformed_request(_: MalformedRequestError, __: str) -> CallStatus:
    message = "The request is not a valid message of its type, or has text that is not UTF-8."
    return CallStatus(StatusCode.INVALID_ARGUMENT, message, (_error_info("MALFORMED_REQUEST"),))


def _request_too_large(error: RequestTooLargeError, _: str) -> CallStatus:
    message = f"The request is larger than {error.limit} bytes, the most that this method takes."
    return CallStatus(StatusCode.RESOURCE_EXHAUSTED, message, (_error_info("REQUEST_TOO_LARGE"),))


def _metadata_too_large(error: MetadataTooLargeError, _: str) -> CallStatus:
    message = f"The call has more than {error.limit} bytes of metadata, the most that this server takes."
    return CallStatus(StatusCode.RESOURCE_EXHAUSTED, message, (_error_info("METADATA_TOO_LARGE"),))


def _incomplete_request(_: IncompleteRequestError, __: str) -> CallStatus:
    return CallStatus(StatusCode.DEADLINE_EXCEEDED, "The request did not arrive in time.", (_error_info("REQUEST_INCOMPLETE"),))


def _overloaded(error: EngineOverloadedError | ServerFullError, _: str) -> CallStatus:
    return CallStatus(
        StatusCode.RESOURCE_EXHAUSTED,
        "The server is full. Try again later.",
        (_retry_info(error.retry_delay), _error_info("OVERLOADED")),
    )


def _quota_exceeded(error: QuotaExceededError, _: str) -> CallStatus:
    failure = QuotaFailure(violations=[QuotaFailure.Violation(subject=error.caller, description=error.quota)])
    info = _error_info("QUOTA_EXCEEDED")
    if error.retry_delay is None:
        message = f"The call exceeds the quota of {error.caller}: {error.quota}."
        return CallStatus(StatusCode.RESOURCE_EXHAUSTED, message, (failure, info))
    message = f"The quota of {error.caller} is used up: {error.quota}. Try again later."
    return CallStatus(StatusCode.RESOURCE_EXHAUSTED, message, (_retry_info(error.retry_delay), failure, info))


def _slow_reader(_: SlowReaderError, __: str) -> CallStatus:
    return CallStatus(
        StatusCode.RESOURCE_EXHAUSTED,
        "The stream was not read in time. Read faster, ask for less, or call GenerateAll.",
        (_error_info("SLOW_READER"),),
    )


def _deadline_exceeded(error: DeadlineExceededError, _: str) -> CallStatus:
    phase = {"IN_QUEUE": "before the generation began", "IN_GENERATION": "before the generation finished"}
    return CallStatus(StatusCode.DEADLINE_EXCEEDED, f"The deadline passed {phase[error.reason]}.", (_error_info(error.reason),))


def _engine_timeout(error: EngineTimeoutError, _: str) -> CallStatus:
    return CallStatus(
        StatusCode.DEADLINE_EXCEEDED,
        f"The generation took longer than the {error.seconds:g} s that the deployment allows. Ask for fewer tokens or samples.",
        (_error_info("ENGINE_TIMEOUT", timeout_seconds=f"{error.seconds:g}"),),
    )


def _unauthenticated(error: UnauthenticatedError, _: str) -> CallStatus:
    send_a_key = "Send one as metadata: authorization: Bearer KEY."
    messages: dict[UnauthenticatedReason, str] = {
        "API_KEY_MISSING": f"The call needs an API key. {send_a_key}",
        "API_KEY_INVALID": f"The call has an API key that is not accepted. {send_a_key}",
        "API_KEY_EXPIRED": f"The API key of the call has expired. {send_a_key}",
        "API_KEY_REVOKED": f"The API key of the call was revoked. {send_a_key}",
        "CERTIFICATE_INVALID": "The client certificate has a name that cannot be relied on. Use one whose names are printable, "
        "and keep to the rules of SPIFFE if there is a SPIFFE ID.",
    }
    return CallStatus(StatusCode.UNAUTHENTICATED, messages[error.reason], (_error_info(error.reason),))


def _setup(error: EngineSetupError, _: str) -> CallStatus:
    return CallStatus(
        StatusCode.FAILED_PRECONDITION,
        f"The engine is not set up: {error.problem}.",
        (_error_info("ENGINE_NOT_SET_UP", **error.facts),),
    )


def _unavailable(error: EngineUnavailableError, _: str) -> CallStatus:
    return CallStatus(
        StatusCode.UNAVAILABLE,
        "The engine is not available. Try again later.",
        (_retry_info(error.retry_delay), _error_info("ENGINE_UNAVAILABLE")),
    )


def _out_of_resources() -> CallStatus:
    # Not RESOURCE_EXHAUSTED: on UNAVAILABLE, gRPC's retries and proxies try another server, which may have resources left.
    return CallStatus(
        StatusCode.UNAVAILABLE,
        "The server has run out of descriptors, memory, threads or disk space. Try again later.",
        (_retry_info(SHORTAGE_RETRY_DELAY), _error_info("OUT_OF_RESOURCES")),
    )


def _failed(_: Exception, request_id: str) -> CallStatus:
    return CallStatus(
        StatusCode.INTERNAL,
        f"The generation failed. The server's log has the cause under request id {request_id}.",
        (_error_info("ENGINE_FAILED", request_id=request_id),),
    )


TABLE: Final[Mapping[type[Exception], Callable[[Any, str], CallStatus]]] = {
    InvalidRequestError: _invalid_request,
    PromptTooLongError: _prompt_too_long,
    InvalidFieldError: _invalid_field,
    UnsupportedFieldError: _unsupported_field,
    UnknownFieldError: _unknown_field,
    UnsupportedMethodError: _unsupported_method,
    MalformedRequestError: _malformed_request,
    RequestTooLargeError: _request_too_large,
    MetadataTooLargeError: _metadata_too_large,
    IncompleteRequestError: _incomplete_request,
    ServerFullError: _overloaded,
    EngineOverloadedError: _overloaded,
    QuotaExceededError: _quota_exceeded,
    SlowReaderError: _slow_reader,
    DeadlineExceededError: _deadline_exceeded,
    EngineTimeoutError: _engine_timeout,
    UnauthenticatedError: _unauthenticated,
    EngineSetupError: _setup,
    EngineUnavailableError: _unavailable,
    EngineFailedError: _failed,
}


def status_of(error: Exception, request_id: str) -> CallStatus:
    """Returns the status of a call in which `error` was raised."""
    if is_shortage(error):
        return _out_of_resources()
    row = next(TABLE[kind] for kind in (*type(error).__mro__, EngineFailedError) if kind in TABLE)
    return row(error, request_id)
