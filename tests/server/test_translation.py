"""Translation between protobuf and pydantic loses nothing, adds nothing, and lets no wrong value through."""

import struct
import time
from contextlib import nullcontext
from typing import Any

import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.engines.base import EngineModel, EngineStats
from flywheel_server.messages import (
    GenerationRequest,
    GenerationResponse,
    GenerationResponseSample,
    InvalidRequestError,
    RequestLimits,
)
from flywheel_server.translation import (
    delta_to_proto,
    last_delta_to_proto,
    model_to_proto,
    request_from_proto,
    response_to_proto,
    sample_to_proto,
    stats_to_proto,
)
from hypothesis import given
from hypothesis import strategies as st

from fuzz.ranges import Floats, Integers, Range, Repeated, Texts, ranges

LIMITS = RequestLimits(max_text_bytes=200, max_num_samples=16, context_tokens=8192)
INT32 = st.integers(-(2**31), 2**31 - 1)
FLOAT = st.floats(width=32)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)

NATURAL = st.integers(0, 2**31 - 1)
POSITIVE_FLOAT = st.floats(0, width=32, allow_nan=False, allow_infinity=False)
RANGES = ranges(LIMITS)
FIELDS = pb.GenerationRequest.DESCRIPTOR.fields


def anything(its: Range) -> st.SearchStrategy[Any]:
    """Returns whatever protobuf lets a field of this kind hold."""
    match its:
        case Integers():
            return INT32
        case Floats():
            return FLOAT
        case Texts():
            return TEXT
        case Repeated():
            return st.lists(anything(its.element), max_size=its.max_elements + 6)


def valid(its: Range) -> st.SearchStrategy[Any]:
    """Returns what the contract accepts of a field with this range."""
    match its:
        case Integers():
            return st.integers(its.lowest, its.highest)
        case Floats():
            return st.floats(its.lowest, its.highest, width=32)
        case Texts():
            return TEXT.filter(its.accepts)
        case Repeated():
            return st.lists(valid(its.element), max_size=its.max_elements)


any_fields = st.fixed_dictionaries({}, optional={name: anything(its) for name, its in RANGES.items()})
REQUIRED = ("text", "max_tokens")
valid_fields = st.fixed_dictionaries(
    {name: valid(RANGES[name]) for name in REQUIRED},
    optional={name: valid(its) for name, its in RANGES.items() if name not in REQUIRED},
)
samples = st.builds(
    GenerationResponseSample,
    text=TEXT,
    generated_tokens=NATURAL,
    finished=POSITIVE_FLOAT,
    finish_reason=TEXT,
    index=NATURAL,
    prompt_tokens=NATURAL,
    stop_sequence=TEXT,
)


@given(valid_fields)
def test_a_valid_request_arrives_as_it_was_sent(fields: dict[str, Any]) -> None:
    message = pb.GenerationRequest.FromString(pb.GenerationRequest(**fields).SerializeToString())
    request = request_from_proto(message, LIMITS)
    defaults = {name: field.default for name, field in GenerationRequest.model_fields.items() if not field.is_required()}
    for name, value in {**defaults, **fields}.items():
        assert getattr(request, name) == (tuple(value) if isinstance(value, list) else value)


@given(any_fields)
def test_exactly_the_fields_out_of_range_are_named(fields: dict[str, Any]) -> None:
    sent = {"text": "", "max_tokens": 0, **fields}
    wrong = {name for name, value in sent.items() if not RANGES[name].accepts(value)}
    with pytest.raises(InvalidRequestError) if wrong else nullcontext() as caught:
        request_from_proto(pb.GenerationRequest(**fields), LIMITS)
    named = [violation.field.partition("[")[0] for violation in caught.value.violations] if caught else []
    assert sorted(named) == sorted(wrong)


@pytest.mark.parametrize("name", RANGES)
def test_each_range_ends_where_the_range_of_the_contract_ends(name: str) -> None:
    def request(value: Any) -> GenerationRequest:
        return request_from_proto(pb.GenerationRequest(**{"text": "x", "max_tokens": 1, name: value}), LIMITS)

    for value in (RANGES[name].lowest, RANGES[name].highest):
        assert getattr(request(value), name) == (tuple(value) if isinstance(value, list) else value)
    for path, value in RANGES[name].wrong():
        with pytest.raises(InvalidRequestError) as caught:
            request(value)
        assert [violation.field for violation in caught.value.violations] == [name + path]


@pytest.mark.parametrize("name", [field.name for field in FIELDS if field.has_presence])
def test_unset_is_the_default_and_zero_is_zero(name: str) -> None:
    unset = pb.GenerationRequest(text="x", max_tokens=1)
    assert getattr(request_from_proto(unset, LIMITS), name) == GenerationRequest.model_fields[name].default
    zero = pb.GenerationRequest(text="x", max_tokens=1)
    setattr(zero, name, 0)
    if RANGES[name].accepts(0):
        assert getattr(request_from_proto(zero, LIMITS), name) == 0
    else:
        with pytest.raises(InvalidRequestError, match=name):
            request_from_proto(zero, LIMITS)


@pytest.mark.parametrize("name", [name for name, its in RANGES.items() if isinstance(its, Floats)])
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800001, 0xFFC00000, 0x7F800000, 0xFF800000])
def test_every_kind_of_nan_and_infinity_is_refused(name: str, bits: int) -> None:
    (value,) = struct.unpack(">f", struct.pack(">I", bits))
    with pytest.raises(InvalidRequestError, match=name):
        request_from_proto(pb.GenerationRequest(text="x", max_tokens=1, **{name: value}), LIMITS)


def test_a_message_full_of_bad_elements_is_refused_at_once() -> None:
    bad: dict[str, Any] = {
        name: [its.element.wrong()[0][1]] * 500_000 for name, its in RANGES.items() if isinstance(its, Repeated)
    }
    message = pb.GenerationRequest(text="x", max_tokens=1, **bad)
    start = time.process_time()
    with pytest.raises(InvalidRequestError) as caught:
        request_from_proto(message, LIMITS)
    assert {violation.field.partition("[")[0] for violation in caught.value.violations} == set(bad)
    assert time.process_time() - start < 0.5, "checking each element takes seconds, on the event loop"


@given(samples)
def test_a_sample_goes_out_whole(sample: GenerationResponseSample) -> None:
    message = pb.GenerationResponseSample.FromString(sample_to_proto(sample).SerializeToString())
    assert (
        GenerationResponseSample.model_validate(
            {field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields}
        )
        == sample
    )


@given(st.lists(samples, min_size=1, max_size=3), TEXT, POSITIVE_FLOAT)
def test_a_response_goes_out_whole(several: list[GenerationResponseSample], prompt: str, created: float) -> None:
    request = GenerationRequest.model_construct(text=prompt, max_tokens=1)
    message = pb.GenerationResponse.FromString(response_to_proto(request, created, several).SerializeToString())
    response = GenerationResponse.of(request, created, several)
    assert list(message.responses) == [sample_to_proto(sample) for sample in response.responses]
    for name in ("created", "finished", "num_samples", "prompt", "prompt_tokens"):
        assert getattr(message, name) == getattr(response, name)


@given(samples, TEXT)
def test_the_last_delta_has_all_of_the_sample_but_its_text(sample: GenerationResponseSample, rest: str) -> None:
    message = last_delta_to_proto(sample, rest)
    assert message.text == rest
    for field in message.DESCRIPTOR.fields:
        if field.name != "text":
            assert getattr(message, field.name) == getattr(sample, field.name)


def test_an_ordinary_delta_has_no_end() -> None:
    assert delta_to_proto(1, "x", 2) == pb.GenerationDelta(index=1, text="x", generated_tokens=2)


def test_model_and_stats_go_out_whole() -> None:
    model = model_to_proto(EngineModel("m", "e", 10, penalizes_prompt=True, prompt_format="chat"), LIMITS)
    assert all(model.HasField(name) for name in ("limits", "defaults"))
    assert (model.name, model.engine, model.context_tokens, model.penalizes_prompt, model.prompt_format) == (
        "m",
        "e",
        10,
        True,
        "chat",
    )
    assert model.limits.max_text_bytes == LIMITS.max_text_bytes
    stats = stats_to_proto(EngineStats(backlog=3, num_total_runners=2), active=4, queued=5)
    assert stats == pb.Stats(backlog=3, num_total_runners=2, active=4, queued=5)


def test_the_models_have_the_fields_of_the_contract() -> None:
    for model in (GenerationRequest, GenerationResponseSample, GenerationResponse):
        message = pb.DESCRIPTOR.message_types_by_name[model.__name__]
        assert list(model.model_fields) == [field.name for field in message.fields]
    assert list(RANGES) == [field.name for field in FIELDS]


def test_the_stated_defaults_are_those_of_the_fields_with_presence() -> None:
    with_default = [name for name, field in GenerationRequest.model_fields.items() if field.default is not None]
    with_presence = {field.name for field in FIELDS if field.has_presence}
    stated = [field.name for field in pb.Defaults.DESCRIPTOR.fields]
    assert stated == [name for name in with_default if name in with_presence]
