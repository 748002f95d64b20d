"""A gateway and a class on Modal of different versions: a newer field is sent only if set, and refused by name if not taken."""

from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio
import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.deployment.model import RemoteModel
from flywheel_server.engines.base import UnsupportedFieldError
from flywheel_server.engines.modal import event_batch
from flywheel_server.engines.modal.engine import FlywheelEngine
from flywheel_server.engines.modal.event_batch import EventBatch, Receipt
from flywheel_server.engines.modal.remote_fields import UNKNOWN_FIELD, arguments_of, further_fields, refusal
from flywheel_server.engines.scripted import ScriptedEngine
from flywheel_server.messages import FLYWHEEL_FIELDS, GenerationRequest, GenerationResponse, GenerationResponseSample
from flywheel_server.translation import request_from_proto
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo

from tests.modal_cloud import ModalCloud, scripted
from tests.server.test_errors import details_of
from tests.serving import Target, drained, serving
from tests.thorough import each_once

METHODS = ["Generate", "GenerateDeltas", "GenerateAll"]
CLASSES = ["Model", "Flywheel", "Versioned", "VersionedWhole", "Untold"]
OLDER, NEWER = "older", "newer"
REQUEST = pb.GenerationRequest(text="hello", max_tokens=12, num_samples=2)


class NewerRequest(GenerationRequest):
    scratch: int = 0


@pytest.fixture(scope="module")
def deployed(cloud: ModalCloud) -> ModalCloud:
    scripted.deploy(cloud, OLDER)
    scripted.deploy(cloud, NEWER, newer=True)
    return cloud


SetScratch = Callable[[int], None]


@pytest.fixture
def newer_gateway(monkeypatch: pytest.MonkeyPatch) -> SetScratch:
    """Makes the gateway one of a version that has the field, and sets it in each request."""

    def set_scratch(value: int) -> None:
        def newer(*arguments: Any) -> GenerationRequest:
            return NewerRequest(**request_from_proto(*arguments).model_dump(), scratch=value)

        monkeypatch.setattr("flywheel_server.service.request_from_proto", newer)

    return set_scratch


async def finish_reasons(target: Target, method: str) -> list[str]:
    call = getattr(target.stub, method)(REQUEST)
    messages = list((await call).responses) if method == "GenerateAll" else [each async for each in call]
    return [message.finish_reason for message in messages if message.finish_reason]


@pytest.mark.parametrize(("class_name", "method"), each_once(CLASSES, METHODS))
async def test_a_field_that_the_class_does_not_take_is_refused_by_name_if_it_is_set(
    class_name: str, method: str, deployed: ModalCloud, newer_gateway: SetScratch, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks: list[FlywheelEngine] = []
    check = FlywheelEngine.check

    async def counted(engine: FlywheelEngine) -> None:
        checks.append(engine)
        await check(engine)

    monkeypatch.setattr(FlywheelEngine, "check", counted)
    async with serving(scripted.engine(OLDER, class_name)) as target:
        newer_gateway(5)
        before = len(deployed.calls)
        for _ in range(2):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await drained(getattr(target.stub, method)(REQUEST))
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            details = details_of(caught.value)
            assert (details[ErrorInfo].reason, details[ErrorInfo].metadata) == ("UNSUPPORTED_FIELD", {"field": "scratch"})
            assert [violation.field for violation in details[BadRequest].field_violations] == ["scratch"]
        assert len(deployed.calls) == before, "no call reaches the class"
        newer_gateway(0)
        assert await finish_reasons(target, method) == ["length"] * 2
        assert len(checks) == 1, "only at the start: the engine has not failed"


@pytest.mark.parametrize(("class_name", "method"), each_once(["Versioned", "VersionedWhole", "Model"], METHODS))
async def test_a_field_that_the_class_takes_arrives(
    class_name: str, method: str, deployed: ModalCloud, newer_gateway: SetScratch
) -> None:
    async with serving(scripted.engine(NEWER, class_name)) as target:
        for value in (5, 0):
            newer_gateway(value)
            assert await finish_reasons(target, method) == [f"scratch {value}"] * 2


@pytest.mark.parametrize(("class_name", "method"), each_once(["Versioned", "VersionedWhole", "Model", "Flywheel"], METHODS))
async def test_an_older_gateway_takes_what_a_newer_class_says(class_name: str, method: str, deployed: ModalCloud) -> None:
    async with serving(scripted.engine(NEWER, class_name)) as target:
        expected = "length" if class_name == "Flywheel" else "scratch 0"
        assert await finish_reasons(target, method) == [expected] * 2


async def test_a_class_that_is_deployed_anew_is_asked_anew(cloud: ModalCloud, newer_gateway: SetScratch) -> None:
    scripted.deploy(cloud, "renewed")
    async with serving(scripted.engine("renewed", "Versioned")) as target:
        newer_gateway(5)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await target.stub.GenerateAll(REQUEST)
        assert details_of(caught.value)[ErrorInfo].reason == "UNSUPPORTED_FIELD"
        scripted.deploy(cloud, "renewed", newer=True)
        assert await finish_reasons(target, "GenerateDeltas") == ["scratch 5"] * 2


@pytest.mark.parametrize("method", METHODS)
async def test_an_older_version_that_is_deployed_again_refuses_a_field_itself(
    method: str, deployed: ModalCloud, newer_gateway: SetScratch, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fields_of(_: Any) -> frozenset[str]:
        return frozenset(NewerRequest.model_fields)

    monkeypatch.setattr("flywheel_server.engines.modal.remote_class.fields_of", fields_of)
    async with serving(scripted.engine(OLDER, "Model")) as target:
        newer_gateway(5)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await drained(getattr(target.stub, method)(REQUEST))
        assert details_of(caught.value)[ErrorInfo].metadata == {"field": "scratch"}


def test_flywheels_fields_are_the_first_eleven_of_the_contract() -> None:
    fields = pb.GenerationRequest.DESCRIPTOR.fields_by_number
    assert {fields[number].name for number in range(1, 12)} == FLYWHEEL_FIELDS


def test_flywheels_fields_are_always_sent_and_others_only_if_they_are_set() -> None:
    plain = NewerRequest(text="x", max_tokens=1)
    assert set(arguments_of(plain)) == set(FLYWHEEL_FIELDS)
    assert arguments_of(NewerRequest(text="x", max_tokens=1, scratch=0)) == arguments_of(plain)
    assert arguments_of(NewerRequest(text="x", max_tokens=1, scratch=3)) == {**arguments_of(plain), "scratch": 3}
    assert further_fields(NewerRequest(text="x", max_tokens=1, scratch=3, top_k=7)) == {"scratch": 3}


@pytest.mark.parametrize(
    ("error", "field"),
    [
        (TypeError("Model.generate() got an unexpected keyword argument 'scratch'"), "scratch"),
        (TypeError("generate() got an unexpected keyword argument 'scratch'. Did you mean 'stretch'?"), "scratch"),
        (ValueError(f"scratch: {UNKNOWN_FIELD}"), "scratch"),
        (ValueError(f"top_k: Input should be greater than or equal to 0; scratch: {UNKNOWN_FIELD}"), "scratch"),
        (TypeError("Model.generate() got an unexpected keyword argument 'top_k'"), None),
        (TypeError("unsupported operand type(s) for +: 'int' and 'str'"), None),
        (ValueError("scratch: Input should be a valid integer"), None),
        (ValueError(f"other: {UNKNOWN_FIELD}"), None),
        (RuntimeError(f"scratch: {UNKNOWN_FIELD}"), None),
        (SystemExit(1), None),
    ],
)
def test_which_errors_of_a_class_refuse_a_field(error: BaseException, field: str | None) -> None:
    found = refusal(error, ["scratch"])
    assert (found.field if found else None) == field
    assert refusal(error, []) is None


@pytest.mark.parametrize("method", ["generate", "generate_deltas"])
async def test_what_our_class_says_of_an_unknown_field_is_understood(method: str) -> None:
    """Classes that are deployed already say the same, in pydantic's own words."""
    sender: dict[str, Any] = {} if method == "generate" else {"queue": None, "partition": "p", "call": "c"}
    arguments = arguments_of(NewerRequest(text="x", max_tokens=1, scratch=3))
    with pytest.raises(ValueError, match="scratch") as caught:
        await getattr(RemoteModel(ScriptedEngine()), method)(**sender, **arguments)
    assert isinstance(refusal(caught.value, ["scratch"]), UnsupportedFieldError)


REQUIRED = {
    GenerationRequest: {"max_tokens"},
    GenerationResponse: {"created", "finished", "num_samples", "responses"},
    GenerationResponseSample: {"text", "generated_tokens", "finished", "finish_reason"},
    Receipt: {"attempt", "piles"},
    event_batch._EventBatch: {"call", "attempt", "number", "events"},
    event_batch._Started: {"event"},
    event_batch._Delta: {"event", "index", "text", "generated_tokens"},
    event_batch._Sample: {"event", "sample"},
}


@pytest.mark.parametrize("message", REQUIRED)
def test_nothing_is_required_that_an_older_version_does_not_send(message: Any) -> None:
    """A field that is added needs a default: the other container may be of the version before."""
    assert {name for name, field in message.model_fields.items() if field.is_required()} == REQUIRED[message]


def test_what_a_newer_version_adds_to_events_is_passed_over() -> None:
    news = {"news": [1]}
    sample = {"text": "x", "generated_tokens": 1, "finished": 1.0, "finish_reason": "stop"}
    events: list[dict[str, Any]] = [
        {"event": "started"},
        {"event": "delta", "index": 0, "text": "x", "generated_tokens": 1},
        {"event": "sample", "sample": sample},
    ]
    plain = {"call": "c", "attempt": "a", "number": 0, "events": events}
    newer = {**plain, **news, "events": [{**event, **news} for event in events]}
    assert EventBatch.unpack(newer) == EventBatch.unpack(plain)
    assert Receipt.model_validate({"attempt": "a", "piles": 1, **news}) == Receipt(attempt="a", piles=1)
