"""Translates exceptions of Modal's client into the errors of `engines.base`, by one table.

Exceptions of a request to Modal, and exceptions with which Modal itself ends a call:

    exception                                            error
    NotFoundError, PermissionDeniedError, AuthError,     EngineSetupError, naming the app, the class and the setting
    InvalidError, UnimplementedError, VersionError
    ResourceExhaustedError                               EngineOverloadedError, with the delay that Modal asks for
    FunctionTimeoutError                                 EngineTimeoutError
    ServiceError, InternalError, InternalFailure,        EngineUnavailableError: the control plane is out of reach, or it has
    ConflictError, ConnectionError, ClientClosed,        lost the container of the call, or has ended the call
    RemoteError, other timeouts, and errors of the
    transport (see `_UNREACHABLE`)
    anything else                                        EngineFailedError

Exceptions of the class on Modal, which Modal's client raises again here. They may have any type, even one of `modal.exception`:

    an error of `engines.base`, raised by our own class  the same error
    TypeError or ValueError for a field that the         UnsupportedFieldError
    class does not take
    anything else                                        EngineFailedError: a retry would use a GPU only to fail again

`modal.exception` documents Modal's exceptions. `engines.modal.remote_call` says what each status of Modal does to a call.
"""

import asyncio
import builtins
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

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
from flywheel_server.engines.modal.remote_fields import refusal, refuses_trace

ErrorTranslator: TypeAlias = Callable[[], AbstractContextManager[None]]
"""Makes a context that raises errors of Modal and of the class as errors of `engines.base`; see `as_engine_errors`."""


@dataclass(frozen=True, slots=True)
class Target:
    """Names the class on Modal that generates. If `environment` is empty, it is the environment of the Modal profile."""

    app: str
    class_name: str
    environment: str = ""

    def __str__(self) -> str:
        environment = f"environment {self.environment}" if self.environment else "the default environment"
        return f"class {self.class_name} of app {self.app} in {environment}"

    def facts(self, setting: str) -> dict[str, str]:
        """Returns the metadata of an error: the names of the class, and the setting to look at."""
        return {"app": self.app, "class": self.class_name, "environment": self.environment, "setting": setting}


_SETUP_PROBLEMS: Final[dict[type[BaseException], tuple[str, str]]] = {
    exception.NotFoundError: ("Modal has no {target}, or not its method `generate`", "FLYWHEEL_MODAL_APP"),
    exception.PermissionDeniedError: ("Modal does not permit the server to use {target}", "FLYWHEEL_MODAL_ENVIRONMENT"),
    exception.AuthError: ("Modal does not accept the server's token to use {target}", "MODAL_TOKEN_ID"),
    exception.InvalidError: ("Modal refuses {target} with these settings", "FLYWHEEL_MODAL_GPU"),
    exception.UnimplementedError: ("Modal does not offer what the server asks of {target}", "FLYWHEEL_MODAL_APP"),
    exception.VersionError: ("Modal no longer accepts the server's version of the modal package, for {target}", "modal"),
}

MAX_MESSAGE_CHARACTERS: Final = 500
"""Maximum length of a message of Modal's. A message that lists, for example, all GPUs can be long."""

_UNREACHABLE: Final = (
    exception.ServiceError,
    exception.InternalError,
    exception.InternalFailure,
    # FAILED_PRECONDITION and ABORTED: the request conflicts with another operation.
    exception.ConflictError,
    exception.ConnectionError,
    exception.ClientClosed,
    exception.TimeoutError,
    # Modal ended the call: its container was preempted, or somebody cancelled the call.
    exception.RemoteError,
    # Errors of the transport, once Modal's client has given up its own retries.
    StreamTerminatedError,
    ProtocolError,
    builtins.OSError,
)


_MODAL_STATUSES: Final = (api_pb2.GenericResult.GENERIC_STATUS_TIMEOUT, api_pb2.GenericResult.GENERIC_STATUS_INTERNAL_FAILURE)
"""The statuses of results that come from Modal itself and not from the class."""

DEFAULT_RETRY_DELAY: Final = 1.0
"""Seconds after which to try again if Modal does not ask for a delay."""


def source_of(error: BaseException) -> Literal["request", "modal", "class"]:
    """Returns the source of an exception that Modal's client has raised.

    - "request": the request itself failed.
    - "modal": the request succeeded, and says that Modal ended the call.
    - "class": the request succeeded, and says that the class raised this exception.

    The type of the exception does not tell. But the client turns results of calls into exceptions in one function,
    `_process_result`, whose variables are still in the traceback. If they are not there, the source is "request".
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        result = frame.f_locals.get("result")
        # Without `data`, the request to fetch a large result has failed.
        if isinstance(result, api_pb2.GenericResult) and "data" in frame.f_locals:
            has_data = result.WhichOneof("data_oneof") is not None
            return "class" if has_data and result.status not in _MODAL_STATUSES else "modal"
    return "request"


def engine_error(error: BaseException, target: Target, timeout: float, sent: Collection[str] = ()) -> EngineError:
    """Returns the error of `engines.base` for an error that came from Modal or from the class.

    Modal ends a call after `timeout` seconds. `sent` names the fields that were sent beyond Flywheel's eleven.
    """
    if isinstance(error, EngineError):
        return error
    if source_of(error) == "class":
        if refuses_trace(error):
            return EngineUnavailableError("the class was deployed again in an older version, which takes no trace")
        # The error's text may contain a prompt, so only its type is logged here. The class logs the text itself.
        return refusal(error, sent) or EngineFailedError(f"{target} raised {type(error).__name__}")
    if isinstance(error, exception.FunctionTimeoutError):
        return EngineTimeoutError(timeout)
    return _error_of_modal(error, target)


def _error_of_modal(error: BaseException, target: Target) -> EngineError:
    if isinstance(error, exception.ResourceExhaustedError):
        return EngineOverloadedError(f"Modal is full or limits its calls: {error}", _retry_after(error))
    if isinstance(error, _UNREACHABLE):
        return EngineUnavailableError(f"Modal cannot be reached, or lost or ended the call: {type(error).__name__}: {error}")
    for kind, (problem, setting) in _SETUP_PROBLEMS.items():
        if isinstance(error, kind):
            return EngineSetupError(problem.format(target=target) + _message(error), target.facts(setting))
    return EngineFailedError(f"the call of {target} failed with {type(error).__name__}")


def _retry_after(error: exception.ResourceExhaustedError) -> float:
    # The public attribute is deprecated; modal's own `is_class_function_lookup_error` also reads the private one.
    details = getattr(error, "_grpc_details", None) or ()
    delays = [detail.retry_after_secs for detail in details if isinstance(detail, api_pb2.RPCRetryPolicy)]
    return max(delays, default=DEFAULT_RETRY_DELAY)


def _message(error: BaseException) -> str:
    """Returns Modal's message on one line, as the end of ours."""
    words = " ".join(str(error).split())
    return f": {words[:MAX_MESSAGE_CHARACTERS].rstrip('.')}" if words else ""


@contextmanager
def as_engine_errors(target: Target, timeout: float, sent: Collection[str] = ()) -> Iterator[None]:
    """Raises errors of Modal and of the class as errors of `engines.base`; see `engine_error`."""
    try:
        yield
    except (asyncio.CancelledError, GeneratorExit):
        raise
    except BaseException as error:
        # BaseException, because a class may raise SystemExit, which must not end this process.
        translated = engine_error(error, target, timeout, sent)
        if translated is error:
            raise
        raise translated from (None if isinstance(translated, EngineFailedError | UnsupportedFieldError) else error)
