"""A refused caller learns everything that is wrong with its request, as far as it is not too much for the trailers."""

from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.engines.base import (
    EngineModel,
    EngineUnavailableError,
    InvalidFieldError,
    PreparedRequest,
    PromptTooLongError,
)
from flywheel_server.engines.llama_cpp.engine import SUPPORTED_FIELDS
from flywheel_server.engines.scripted import ScriptedEngine
from flywheel_server.errors import status_of
from flywheel_server.messages import MAX_VIOLATIONS, FieldViolation, GenerationRequest, InvalidRequestError, RequestLimits
from flywheel_server.translation import request_from_proto
from flywheel_server.violations import name_of
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo

from tests.access.test_quotas import keys_for
from tests.cpu_time import check_cpu_time
from tests.server.test_errors import METHODS, details_of
from tests.serving import Target, code_of, drained, serving

LIMITS = RequestLimits(2**20, 16, 2**17, SUPPORTED_FIELDS)
INVALID = grpc.StatusCode.INVALID_ARGUMENT
MAX_METADATA_BYTES = 8192
"""What gRPC clients take unless they say otherwise."""


class CheckingEngine(ScriptedEngine):
    """Raises its error, if it has one, and keeps the requests that it is asked to check."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.error = error
        self.checked: list[GenerationRequest] = []

    async def prepare(self, request: GenerationRequest) -> PreparedRequest:
        self.checked.append(request)
        if self.error:
            raise self.error
        return await super().prepare(request)

    def model(self) -> EngineModel:
        model = super().model()
        return EngineModel(model.name, "checking", 8192, penalizes_prompt=False, prompt_format="chat", supported_fields=FIELDS)


FIELDS = SUPPORTED_FIELDS - {"regex"}
FOUND = InvalidFieldError("logit_bias[9]", "must be less than 9", [FieldViolation("json_schema", "is not JSON")])


async def refused(target: Target, method: str = "GenerateAll", **fields: Any) -> dict[type[Any], Any]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await drained(getattr(target.stub, method)(pb.GenerationRequest(**fields)))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    return details_of(caught.value)


def names(details: dict[type[Any], Any]) -> set[str]:
    return {violation.field for violation in details[BadRequest].field_violations}


@pytest.mark.parametrize("method", METHODS)
async def test_a_request_may_have_fields_that_are_not_supported_and_wrong_ones(method: str) -> None:
    async with serving(ScriptedEngine()) as target:
        details = await refused(target, method, text="x", max_tokens=0, regex="", logit_bias={-1: 1.0}, top_p=2.0)
        assert names(details) == {"max_tokens", "top_p", "regex", "logit_bias"}
        assert details[ErrorInfo].reason == "UNSUPPORTED_FIELD"
        assert details[ErrorInfo].metadata["field"] in {"regex", "logit_bias"}
        assert ErrorInfo not in await refused(target, method, text="x")


async def test_a_list_whose_elements_are_all_wrong_is_not_said_to_be_short() -> None:
    async with serving(ScriptedEngine()) as target:
        details = await refused(target, text="x", max_tokens=1, choices=pb.Choices(texts=["", ""]))
        assert names(details) == {"choices[0]", "choices[1]"}
        assert names(await refused(target, text="x", max_tokens=1, choices=pb.Choices())) == {"choices"}


@pytest.mark.parametrize("wrong", [{"max_tokens": 0}, {"stop": ["", "a", ""]}, {"regex": "a"}, {"text": ""}], ids=str)
@pytest.mark.parametrize("method", METHODS)
async def test_the_engine_checks_the_rest_of_a_refused_request(method: str, wrong: dict[str, Any]) -> None:
    engine = CheckingEngine(FOUND)
    fields: dict[str, Any] = {"text": "hello", "max_tokens": 3, "logit_bias": {9: 1.0}} | wrong
    if "regex" not in wrong:
        fields["json_schema"] = "{"
    async with serving(engine) as target:
        found = names(await refused(target, method, **fields))
    assert found == {"logit_bias[9]", "json_schema"} | ({"stop[0]", "stop[2]"} if "stop" in wrong else {*wrong})
    (checked,) = engine.checked
    assert (checked.max_tokens, checked.text, checked.logit_bias) == (1, "a", {9: 1.0})


async def test_an_engine_is_not_asked_about_what_it_cannot_know_better() -> None:
    engine = CheckingEngine(FOUND)
    async with serving(engine) as target:
        assert names(await refused(target, text="x", stop=["", ""], seed=1, max_tokens=0)) == {
            "max_tokens",
            "stop[0]",
            "stop[1]",
        }
        assert names(await refused(target, text="x", logit_bias={-1: 1.0}, max_tokens=1)) == {"logit_bias[-1]"}
    assert not engine.checked


@pytest.mark.parametrize("error", [None, EngineUnavailableError("x"), RuntimeError("x"), PromptTooLongError(9, 1, 9)], ids=str)
async def test_what_is_known_is_told_if_the_engine_cannot_check(error: Exception | None) -> None:
    engine = CheckingEngine(error)
    async with serving(engine) as target:
        assert names(await refused(target, text="x", logit_bias={9: 1.0}, max_tokens=0)) == {"max_tokens"}
        stats = await target.stub.GetStats(pb.GetStatsRequest())
        assert (stats.active, stats.queued) == (0, 0)
    assert len(engine.checked) == 1


MANY = 4096
WORST: dict[str, Any] = {
    "max_tokens": 0,
    "eos_token_ids": [-1] * 64,
    "max_input_tokens": -1,
    "stop": [""] * 16,
    "messages": [pb.Message(role="É" * 100)] * 256,
    "prompt_token_ids": [-1] * MANY,
    "logit_bias": {-number: 200.0 for number in range(1, 300)},
    "choices": pb.Choices(texts=[""] * 1000),
    "num_samples": 99,
    "seed": -1,
    "time_limit": -1.0,
}


def test_thousands_of_wrong_elements_make_a_short_answer_at_once() -> None:
    message = pb.GenerationRequest(**WORST)

    def refuse() -> None:
        with pytest.raises(InvalidRequestError) as caught:
            request_from_proto(message, LIMITS)
        status = status_of(caught.value, "id")
        (details,) = status.details
        assert isinstance(details, BadRequest)
        named = [name_of(FieldViolation(each.field, each.description)) for each in details.field_violations]
        assert len(named) == MAX_VIOLATIONS
        assert {*named} == {*WORST}, "the first violation of each field comes before the second of another"
        assert len(caught.value.violations) > 900
        assert f"and {len(caught.value.violations)}" not in status.message
        assert status.message.endswith(" more.")

    check_cpu_time(0.1, refuse)


@pytest.mark.parametrize("count", [1, 2, MAX_VIOLATIONS])
@pytest.mark.parametrize("description", ["must not", "x" * 300, "é" * 300, "🦙" * 300, "\0" * 300])
async def test_the_longest_answer_arrives(description: str, count: int) -> None:
    found = InvalidFieldError.of([FieldViolation(f"messages[{index}].role", description) for index in range(count)])
    async with serving(CheckingEngine(found)) as target:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await target.stub.GenerateAll(pb.GenerationRequest(text="x", max_tokens=1))
    details = details_of(caught.value)
    assert 1 <= len(details[BadRequest].field_violations) <= count
    metadata = caught.value.trailing_metadata() or ()
    escaped = sum(1 if 32 <= byte < 127 else 3 for byte in (caught.value.details() or "").encode())
    assert escaped + sum(len(key) + (len(value) * 4 + 2) // 3 + 32 for key, value in metadata) < MAX_METADATA_BYTES


async def test_a_stranger_cannot_make_the_engine_work() -> None:
    engine = CheckingEngine()
    async with serving(engine, api_keys="key-0123456789abcdef") as target:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await target.stub.GenerateAll(pb.GenerationRequest(text="x", json_schema="{}", max_tokens=0))
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert not engine.checked
        metadata = (("authorization", "Bearer key-0123456789abcdef"),)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await target.stub.GenerateAll(pb.GenerationRequest(text="x", json_schema="{}", max_tokens=0), metadata=metadata)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert len(engine.checked) == 1


async def test_a_refused_request_costs_no_quota(tmp_path: Path) -> None:
    with keys_for(tmp_path / "keys.json", small={"tokens_per_minute": 60}) as metadata:
        async with serving(CheckingEngine(), api_keys_file=str(tmp_path / "keys.json")) as target:
            for _ in range(3):
                refused_ = pb.GenerationRequest(max_tokens=0, messages=[pb.Message(role="user", content="llam" * 40)])
                assert await code_of(target.stub.GenerateAll(refused_, metadata=metadata["small"])) is INVALID
            request = pb.GenerationRequest(text="x", max_tokens=50)
            assert await code_of(target.stub.GenerateAll(request, metadata=metadata["small"])) is grpc.StatusCode.OK
