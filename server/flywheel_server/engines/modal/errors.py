"""What an exception of Modal's client means to the service: one table from it to the errors of `engines.base`.

What a request to Modal raised, and what Modal says of a call:

    exception                                            error
    NotFoundError, PermissionDeniedError, AuthError,     EngineSetupError, naming the app, the class and the setting
    InvalidError, UnimplementedError, VersionError
    ResourceExhaustedError                               EngineOverloadedError, with the delay that Modal asks for
    FunctionTimeoutError                                 EngineTimeoutError
    ServiceError, InternalError, InternalFailure,        EngineUnavailableError: the control plane is out of reach, or has
    ConflictError, ConnectionError, ClientClosed,        lost the container that worked on the call, or ended the call
    RemoteError, other timeouts, and those of the
    transport below
    anything else                                        EngineFailedError

What the class on Modal raised, which Modal's client raises again here, whatever its type, `modal.exception` included:

    an error of `engines.base`, raised by our own class  itself
    TypeError or ValueError for a field that the         UnsupportedFieldError
    class does not take
    anything else                                        EngineFailedError: a second try would fail as well, on a GPU

Modal tables its own in `modal.exception`; `flywheel_server.engines.modal.remote_call` has what becomes of a call.
"""

import asyncio
import builtins
import traceback
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Literal

from grpclib.exceptions import StreamTerminatedError
from h2.exceptions import ProtocolError
from modal import exception
from modal_proto import api_pb2

from flywheel_server.engines.base import (
    EngineError,
    EngineFailedError,
    EngineOverloadedError,
    EngineSetupError,
    EngineTimeoutError,
    EngineUnavailableError,
    UnsupportedFieldError,
)
from flywheel_server.engines.modal.remote_fields import refusal


@dataclass(frozen=True, slots=True)
class Target:
    """Which class on Modal generates. An empty environment is that of the Modal profile."""

    app: str
    class_name: str
    environment: str = ""

    def __str__(self) -> str:
        environment = f"environment {self.environment}" if self.environment else "the default environment"
        return f"class {self.class_name} of app {self.app} in {environment}"

    def facts(self, setting: str) -> dict[str, str]:
        """Returns what was looked for, and the setting to look at, as metadata of an error."""
        return {"app": self.app, "class": self.class_name, "environment": self.environment, "setting": setting}


_SETUP: Final[dict[type[BaseException], tuple[str, str]]] = {
    exception.NotFoundError: ("Modal has no {target}, or not its method `generate`", "FLYWHEEL_MODAL_APP"),
    exception.PermissionDeniedError: ("Modal does not permit the server to use {target}", "FLYWHEEL_MODAL_ENVIRONMENT"),
    exception.AuthError: ("Modal does not accept the server's token to use {target}", "MODAL_TOKEN_ID"),
    exception.InvalidError: ("Modal refuses {target} with these settings", "FLYWHEEL_MODAL_GPU"),
    exception.UnimplementedError: ("Modal does not offer what the server asks of {target}", "FLYWHEEL_MODAL_APP"),
    exception.VersionError: ("Modal no longer accepts the server's version of the modal package, for {target}", "modal"),
}

MAX_MESSAGE_CHARACTERS: Final = 500
"""Characters of what Modal says. Where it lists what it knows, that can be long."""

_UNREACHABLE: Final = (
    exception.ServiceError,
    exception.InternalError,
    exception.InternalFailure,
    # FAILED_PRECONDITION and ABORTED: something else was under way.
    exception.ConflictError,
    exception.ConnectionError,
    exception.ClientClosed,
    exception.TimeoutError,
    # Of a call that Modal ended: its container was preempted, or somebody cancelled it.
    exception.RemoteError,
    # Of the transport, once Modal's client has given up repeating the request.
    StreamTerminatedError,
    ProtocolError,
    builtins.OSError,
)


_OF_MODAL: Final = (api_pb2.GenericResult.GENERIC_STATUS_TIMEOUT, api_pb2.GenericResult.GENERIC_STATUS_INTERNAL_FAILURE)
"""The statuses of results that Modal itself gives to a call."""

DEFAULT_RETRY_DELAY: Final = 1.0
"""Seconds after which to try again if Modal does not say it."""


def source_of(error: BaseException) -> Literal["request", "modal", "class"]:
    """Returns where an exception comes from that Modal's client has raised.

    It is either the failure of a request, or the result of a call: what Modal says of the call, or what the class has raised.
    Any of them may have any type. But the client makes exceptions of results in one place, `_process_result`, whose variables
    are still in the traceback. If a version of the client does not, an exception counts as the failure of a request.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        result = frame.f_locals.get("result")
        # Without the data, it has failed to fetch a large result.
        if isinstance(result, api_pb2.GenericResult) and "data" in frame.f_locals:
            has_data = result.WhichOneof("data_oneof") is not None
            return "class" if has_data and result.status not in _OF_MODAL else "modal"
    return "request"


def engine_error(error: BaseException, target: Target, timeout: float, sent: Collection[str] = ()) -> EngineError:
    """Returns the error of `engines.base` for one that came from Modal or from the class on it.

    `timeout` is the one of the function, in seconds; `sent` has the names of the fields that were sent beyond Flywheel's.
    """
    if isinstance(error, EngineError):
        return error
    if source_of(error) == "class":
        # Its text may hold a prompt, and is in its own log: here is only which kind of error it was.
        return refusal(error, sent) or EngineFailedError(f"{target} raised {type(error).__name__}")
    if isinstance(error, exception.FunctionTimeoutError):
        return EngineTimeoutError(timeout)
    return _error_of_modal(error, target)


def _error_of_modal(error: BaseException, target: Target) -> EngineError:
    if isinstance(error, exception.ResourceExhaustedError):
        return EngineOverloadedError(f"Modal is full or limits its calls: {error}", _retry_after(error))
    if isinstance(error, _UNREACHABLE):
        return EngineUnavailableError(f"Modal cannot be reached, or lost or ended the call: {type(error).__name__}: {error}")
    for kind, (problem, setting) in _SETUP.items():
        if isinstance(error, kind):
            return EngineSetupError(problem.format(target=target) + _words(error), target.facts(setting))
    return EngineFailedError(f"the call of {target} failed with {type(error).__name__}")


def _retry_after(error: exception.ResourceExhaustedError) -> float:
    # The public attribute warns that it will go; modal's own `is_class_function_lookup_error` reads it in this way.
    details = getattr(error, "_grpc_details", None) or ()
    delays = [detail.retry_after_secs for detail in details if isinstance(detail, api_pb2.RPCRetryPolicy)]
    return max(delays, default=DEFAULT_RETRY_DELAY)


def _words(error: BaseException) -> str:
    """Returns what Modal says, on one line, to be added to what we say of it."""
    words = " ".join(str(error).split())
    return f": {words[:MAX_MESSAGE_CHARACTERS].rstrip('.')}" if words else ""


@contextmanager
def as_engine_errors(target: Target, timeout: float, sent: Collection[str] = ()) -> Iterator[None]:
    """Raises the error of `engines.base` for whatever comes from Modal; see `engine_error`."""
    try:
        yield
    except (asyncio.CancelledError, GeneratorExit):
        raise
    except BaseException as error:
        # Also what is no Exception: a class may raise SystemExit, and that must not end this process.
        translated = engine_error(error, target, timeout, sent)
        if translated is error:
            raise
        raise translated from (None if isinstance(translated, EngineFailedError | UnsupportedFieldError) else error)
