"""The server tells exceptions of a class on Modal from exceptions of Modal's client, whatever their type."""

import builtins
import inspect
from collections.abc import AsyncIterator

import grpc
import pytest
from flywheel_client import AsyncClient, FlywheelError
from flywheel_server.engines.modal.errors import source_of
from modal import exception

from tests.modal_cloud import ModalCloud, scripted
from tests.serving import Target, serving

APP = "raising"

OTHERWISE = {
    # The container takes these as its own end.
    "BaseException",
    "GeneratorExit",
    "KeyboardInterrupt",
    # These need more arguments than a text, or are no failures.
    "BaseExceptionGroup",
    "ExceptionGroup",
    "UnicodeDecodeError",
    "UnicodeEncodeError",
    "UnicodeTranslateError",
    "modal.ImageBuildError",
    "modal.InputCancellation",
}


def named(module: object, prefix: str = "") -> list[str]:
    kinds = (kind for kind in vars(module).values() if inspect.isclass(kind) and issubclass(kind, BaseException))
    return sorted({prefix + kind.__name__ for kind in kinds if not issubclass(kind, Warning)} - OTHERWISE)


RAISED = [*named(builtins), *(name for name in named(exception, "modal.") if not name.startswith("modal._"))]


@pytest.fixture(scope="module")
def deployed(cloud: ModalCloud) -> ModalCloud:
    scripted.deploy(cloud, APP)
    return cloud


@pytest.fixture(scope="module", params=["Faulty", "FaultyStream"])
async def target(deployed: ModalCloud, request: pytest.FixtureRequest) -> AsyncIterator[Target]:
    async with serving(scripted.engine(APP, request.param)) as target:
        yield target


@pytest.mark.thorough
async def test_whatever_a_class_raises_is_internal_and_runs_once(deployed: ModalCloud, target: Target) -> None:
    assert {"OSError", "TimeoutError", "ConnectionResetError", "modal.ServiceError", "modal.ResourceExhaustedError"} < set(
        RAISED
    )
    outcomes: dict[str, tuple[grpc.StatusCode, int]] = {}
    async with AsyncClient(target.address) as client:
        for name in RAISED:
            before = len(deployed.calls)
            with pytest.raises(FlywheelError) as caught:
                await client.generate_all(f"raise {name}", max_tokens=3)
            assert "SECRET" not in str(caught.value)
            outcomes[name] = (caught.value.code, len(deployed.calls) - before)
    assert {name: outcome for name, outcome in outcomes.items() if outcome != (grpc.StatusCode.INTERNAL, 1)} == {}


def test_an_error_that_no_call_has_raised_counts_as_an_error_of_a_request() -> None:
    for error in (OSError("x"), exception.ServiceError("x"), TimeoutError()):
        assert source_of(error) == "request"
