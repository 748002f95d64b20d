"""What an exception of Modal's client means to the service: one table from it to the errors of `engines.base`.

    exception                                            error
    NotFoundError, PermissionDeniedError, AuthError,     EngineSetupError, naming the app, the class and the setting
    InvalidError, UnimplementedError, VersionError
    ResourceExhaustedError                               EngineOverloadedError
    FunctionTimeoutError                                 EngineTimeoutError
    TypeError or ValueError for a field that the         UnsupportedFieldError
    class does not take
    ServiceError, InternalError, InternalFailure,        EngineUnavailableError: the control plane is out of reach, or has
    ConnectionError, ClientClosed, RemoteError, other    lost the container that worked on the call, or ended the call
    timeouts, and those of the transport below
    anything else, and what the class itself raised      EngineFailedError
    an error of `engines.base`, raised by our own class  itself

Modal tables its own in `modal.exception`.
"""

import asyncio
import builtins
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from grpclib.exceptions import StreamTerminatedError
from h2.exceptions import ProtocolError
from modal import exception

from flywheel_server.engines.base import (
    EngineError,
    EngineFailedError,
    EngineOverloadedError,
    EngineSetupError,
    EngineTimeoutError,
    EngineUnavailableError,
    UnsupportedFieldError,
)
from flywheel_server.engines.remote_fields import refusal


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

_UNREACHABLE: Final = (
    exception.ServiceError,
    exception.InternalError,
    exception.InternalFailure,
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


def engine_error(error: BaseException, target: Target, timeout: float, sent: Collection[str] = ()) -> EngineError:
    """Returns the error of `engines.base` for one that came from Modal or from the class on it.

    `timeout` is the one of the function, in seconds; `sent` has the names of the fields that were sent beyond Flywheel's.
    """
    known = error if isinstance(error, EngineError) else refusal(error, sent)
    if known is not None:
        return known
    if isinstance(error, exception.FunctionTimeoutError):
        return EngineTimeoutError(timeout)
    if isinstance(error, exception.ResourceExhaustedError):
        return EngineOverloadedError(f"Modal is full or limits its calls: {error}")
    if isinstance(error, _UNREACHABLE):
        return EngineUnavailableError(f"Modal cannot be reached, or lost or ended the call: {type(error).__name__}: {error}")
    for kind, (problem, setting) in _SETUP.items():
        if isinstance(error, kind):
            return EngineSetupError(problem.format(target=target), target.facts(setting))
    return EngineFailedError(f"{target} raised {type(error).__name__}")


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
        # What the class raised may hold a prompt, and is in its own log: here is only which kind of error it was.
        raise translated from (None if isinstance(translated, EngineFailedError | UnsupportedFieldError) else error)
