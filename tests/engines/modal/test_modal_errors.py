"""Every exception of Modal's client has its place in the service's errors, and every error survives the way through Modal."""

import inspect
import pickle

import grpc
import pytest
from flywheel_server.engines import base
from flywheel_server.engines.modal.errors import Target, as_engine_errors, engine_error
from flywheel_server.errors import status_of
from grpclib.exceptions import StreamTerminatedError
from h2.exceptions import ProtocolError
from modal import exception

TARGET = Target("some-app", "Model", "prod")

UNREACHABLE = [
    exception.ServiceError,
    exception.InternalError,
    exception.InternalFailure,
    exception.ConnectionError,
    exception.ClientClosed,
    exception.OutputExpiredError,
    exception.RemoteError,
]
SETUP = {
    exception.NotFoundError: "FLYWHEEL_MODAL_APP",
    exception.PermissionDeniedError: "FLYWHEEL_MODAL_ENVIRONMENT",
    exception.AuthError: "MODAL_TOKEN_ID",
    exception.InvalidError: "FLYWHEEL_MODAL_GPU",
    exception.UnimplementedError: "FLYWHEEL_MODAL_APP",
    exception.VersionError: "modal",
}


def status(error: BaseException) -> grpc.StatusCode:
    return status_of(engine_error(error, TARGET, 600), "id").code


@pytest.mark.parametrize("kind", UNREACHABLE)
def test_out_of_reach(kind: type[Exception]) -> None:
    assert status(kind("why")) is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("error", [ConnectionRefusedError(), TimeoutError(), StreamTerminatedError("gone"), ProtocolError()])
def test_out_of_reach_below_modal(error: Exception) -> None:
    assert status(error) is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(("kind", "setting"), SETUP.items())
def test_not_set_up_names_the_app_and_the_setting_and_says_what_modal_says(kind: type[Exception], setting: str) -> None:
    error = engine_error(kind("Modal says why.\n  And what to do."), TARGET, 600)
    assert isinstance(error, base.EngineSetupError)
    assert error.facts == {"app": "some-app", "class": "Model", "environment": "prod", "setting": setting}
    message = status_of(error, "id").message
    assert "class Model of app some-app in environment prod" in message
    assert message.endswith(": Modal says why. And what to do.")


def test_a_timeout_names_the_seconds() -> None:
    status = status_of(engine_error(exception.FunctionTimeoutError("why"), TARGET, 600), "id")
    assert status.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "600 s" in status.message


def test_full() -> None:
    assert status(exception.ResourceExhaustedError("why")) is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_no_exception_of_modal_is_forgotten() -> None:
    """The exceptions that become INTERNAL are named here, so that a new exception of Modal's makes this test fail."""
    internal = {status(error) for error in (exception.ExecutionError("x"), ValueError("x"), SystemExit(1))}
    assert internal == {grpc.StatusCode.INTERNAL}
    left = {
        kind.__name__
        for kind in vars(exception).values()
        if inspect.isclass(kind) and issubclass(kind, exception.Error) and "Sandbox" not in kind.__name__
        if type(engine_error(kind.__new__(kind), TARGET, 600)) is base.EngineFailedError
    }
    assert left == {
        "AlreadyExistsError",
        "DataLossError",
        "DeserializationError",
        "Error",
        "ExecutionError",
        "LogsFetchError",
        "RequestSizeError",
        "SerializationError",
        "SnapshotCreationError",
        "WorkspaceManagementError",
    }


@pytest.mark.parametrize(
    "error",
    [
        base.EngineUnavailableError("why", 2.5),
        base.EngineOverloadedError("why", 2.5),
        base.EngineFailedError("why"),
        base.EngineTimeoutError(600),
        base.EngineSetupError("why", {"app": "x"}),
        base.PromptTooLongError(9000, 5, 8192),
        base.UnsupportedFieldError("top_k", "why"),
    ],
)
def test_our_own_errors_come_through(error: base.EngineError) -> None:
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - as Modal does
    assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))
    with pytest.raises(type(error)) as caught, as_engine_errors(TARGET, 600):
        raise error
    assert caught.value is error
