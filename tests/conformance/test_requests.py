"""What a request may hold: every field at and beyond its limits, and what unset fields mean."""

import math
from typing import Any

import grpc
import grpc.aio
import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.messages import FLYWHEEL_FIELDS, RequestLimits
from google.rpc.error_details_pb2 import BadRequest
from google.rpc.status_pb2 import Status

from fuzz.ranges import (
    CONSTRAINTS,
    PROMPTS,
    Biases,
    Choices,
    Messages,
    Repeated,
    highest,
    lowest,
    ranges,
    with_required,
)
from tests.serving import Target, as_dict, drained

TEXT = "Tell me about llamas."

LIMITS = RequestLimits(max_text_bytes=2**20, max_num_samples=16, context_tokens=8192)
RANGES = ranges(LIMITS)
BAD = [
    pytest.param(name, path, value, id=f"{name}-{number}")
    for name, its in RANGES.items()
    for number, (path, value) in enumerate(its.wrong())
]
METHODS = ["Generate", "GenerateDeltas", "GenerateAll"]


async def violations(target: Target, method: str, request: pb.GenerationRequest) -> dict[str, str]:
    """Returns the field violations that the call is refused with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await drained(getattr(target.stub, method)(request))
    return bad_request(caught.value)


def bad_request(error: grpc.aio.AioRpcError) -> dict[str, str]:
    """Returns field and description of each violation in the details of an INVALID_ARGUMENT."""
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    status = Status.FromString(as_dict(error.trailing_metadata())["grpc-status-details-bin"])
    assert status.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    details = BadRequest()
    assert any(detail.Unpack(details) for detail in status.details)
    return {violation.field: violation.description for violation in details.field_violations}


@pytest.mark.parametrize(("name", "path", "value"), BAD)
async def test_a_field_out_of_range_is_refused_by_name(target: Target, name: str, path: str, value: Any) -> None:
    request = pb.GenerationRequest(**with_required({name: value}))
    found = await violations(target, "GenerateAll", request)
    is_supported = name in (await target.stub.GetModel(pb.GetModelRequest())).supported_fields
    expected = name + path if is_supported else name
    assert list(found) == [expected]
    assert ("must" if is_supported else "is not supported") in found[expected]


WRONG_TWICE = {
    "eos_token_ids": ([1, -1, 2, -2], ["[1]", "[3]"]),
    "stop": (["", "a", "b" * 257], ["[0]", "[2]"]),
    "messages": ([pb.Message(role="A"), pb.Message(role="user"), pb.Message()], ["[0].role", "[2].role"]),
    "prompt_token_ids": ([-7, 1, 2, -1], ["[0]", "[3]"]),
    "logit_bias": ({-5: 1.0, 7: math.nan, 8: 1.0, 9: 101.0}, ["[-5]", "[7]", "[9]"]),
    "choices": (pb.Choices(texts=["", "a", ""]), ["[0]", "[2]"]),
}


@pytest.mark.parametrize("name", WRONG_TWICE)
async def test_each_wrong_element_is_named_along_with_the_other_fields(target: Target, name: str) -> None:
    if name not in (await target.stub.GetModel(pb.GetModelRequest())).supported_fields:
        pytest.skip("the server refuses the field")
    elements, paths = WRONG_TWICE[name]
    fields: dict[str, Any] = {**with_required({name: elements}), "max_tokens": 0, "top_p": 0.0}
    found = await violations(target, "GenerateAll", pb.GenerationRequest(**fields))
    assert set(found) == {"max_tokens", "top_p", *(name + path for path in paths)}


TOO_MANY = {
    "eos_token_ids": [-1] * 65,
    "stop": [""] * 17,
    "messages": [pb.Message(role="A")] * 257,
    "prompt_token_ids": [-1] * (LIMITS.context_tokens + 1),
    "logit_bias": dict.fromkeys(range(-301, 0), 1.0),
    "choices": pb.Choices(texts=[""] * 1001),
}


@pytest.mark.parametrize("name", TOO_MANY)
async def test_too_many_elements_are_named_even_if_each_of_them_is_wrong(target: Target, name: str) -> None:
    if name not in (await target.stub.GetModel(pb.GetModelRequest())).supported_fields:
        pytest.skip("the server refuses the field")
    request = pb.GenerationRequest(**{**with_required({name: TOO_MANY[name]}), "max_tokens": 0})
    found = await violations(target, "GenerateAll", request)
    assert {"max_tokens", name} <= {*found}
    assert all(field.startswith((name, "max_tokens")) for field in found)
    assert 10 <= len(found) <= 32


def test_there_is_a_case_of_each_field_with_elements() -> None:
    several = (Repeated, Messages, Biases, Choices)
    assert {*WRONG_TWICE} == {*TOO_MANY} == {name for name, its in RANGES.items() if isinstance(its, several)}


@pytest.mark.parametrize(("method", "constraint"), [*zip(METHODS, CONSTRAINTS, strict=True)])
async def test_all_violations_come_at_once(target: Target, method: str, constraint: str) -> None:
    left_out = {*CONSTRAINTS} - {constraint}
    last = {name: its.wrong()[-1] for name, its in RANGES.items() if name not in left_out}
    worst = pb.GenerationRequest(**{name: value for name, (_, value) in last.items()})
    supported = (await target.stub.GetModel(pb.GetModelRequest())).supported_fields
    expected = {name + path if name in supported else name for name, (path, _) in last.items()}
    assert set(await violations(target, method, worst)) == expected
    samples = (await target.stub.GenerateAll(pb.GenerationRequest(text=TEXT, max_tokens=1))).responses
    assert len(samples) == 1, "the server goes on serving"


@pytest.mark.parametrize("method", METHODS)
async def test_several_prompts_are_refused(target: Target, method: str) -> None:
    request = pb.GenerationRequest(text=TEXT, max_tokens=1, messages=[pb.Message(role="user")], prompt_token_ids=[1])
    assert list(await violations(target, method, request)) == list(PROMPTS)
    assert list(await violations(target, method, pb.GenerationRequest(max_tokens=1))) == ["text"]


async def test_values_at_the_limits_are_accepted(target: Target) -> None:
    # Every engine honours these fields; others may be refused as unsupported.
    honoured = {name: RANGES[name] for name in FLYWHEEL_FIELDS}
    least = pb.GenerationRequest(**lowest(honoured))
    most = pb.GenerationRequest(**highest(honoured) | {"text": "x" * 30, "max_tokens": 2})
    for request in (least, most):
        response = await target.stub.GenerateAll(request)
        assert response.num_samples == request.num_samples


async def test_prompt_and_max_tokens_beyond_the_context_are_refused_with_both_numbers(target: Target) -> None:
    model = await target.stub.GetModel(pb.GetModelRequest())
    found = await violations(target, "GenerateAll", pb.GenerationRequest(text=TEXT, max_tokens=model.context_tokens))
    assert list(found) == ["max_tokens"]
    prompt_tokens = (await target.stub.GenerateAll(pb.GenerationRequest(text=TEXT, max_tokens=1))).prompt_tokens
    assert str(prompt_tokens) in found["max_tokens"]
    assert str(model.context_tokens) in found["max_tokens"]
    long = pb.GenerationRequest(text="llama " * 50_000, max_tokens=1)
    assert list(await violations(target, "GenerateAll", long)) == ["text"]
    long.max_input_tokens = 16
    response = await target.stub.GenerateAll(long)
    assert response.prompt_tokens == 16


async def test_max_tokens_is_exact(target: Target) -> None:
    for max_tokens in (1, 2, 7):
        request = pb.GenerationRequest(text=TEXT, max_tokens=max_tokens, temperature=0.0)
        (sample,) = (await target.stub.GenerateAll(request)).responses
        assert (sample.generated_tokens, sample.finish_reason) == (max_tokens, "length")


async def test_the_published_request_gets_a_whole_response(target: Target) -> None:
    request = pb.GenerationRequest(
        text="What is the difference between a llama and an alpaca?",
        max_tokens=32,
        eos_token_ids=[1, 2],
        temperature=0.8,
        top_k=50,
        top_p=1.0,
        num_samples=3,
    )
    response = await target.stub.GenerateAll(request)
    assert response.prompt == request.text
    assert response.num_samples == len(response.responses) == 3
    assert 1e9 < response.created <= response.finished
    assert response.prompt_tokens > 0
    for sample in response.responses:
        assert response.created <= sample.finished <= response.finished
        assert 1 <= sample.generated_tokens <= request.max_tokens
        assert sample.prompt_tokens == response.prompt_tokens
        assert sample.finish_reason in {"stop", "length"}


async def test_the_model_tells_limits_and_defaults(target: Target) -> None:
    model = await target.stub.GetModel(pb.GetModelRequest())
    assert model.name
    assert model.context_tokens == LIMITS.context_tokens
    assert model.limits == pb.Limits(
        max_text_bytes=2**20,
        max_num_samples=16,
        max_eos_token_ids=64,
        max_stop_sequences=16,
        max_stop_bytes=256,
        max_messages=256,
        max_logit_bias=300,
        max_constraint_bytes=2**16,
        max_choices=1000,
        max_logprobs=20,
    )
    assert model.defaults == pb.Defaults(num_samples=1, temperature=1.0, top_k=50, top_p=1.0, repetition_penalty=1.0)
    assert FLYWHEEL_FIELDS | {"priority"} <= set(model.supported_fields) <= set(RANGES)
