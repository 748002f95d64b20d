"""Translation between protobuf and pydantic loses nothing, adds nothing, and lets no wrong value through."""

import struct
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.engines.base import EngineModel, EngineStats
from flywheel_server.messages import (
    FLYWHEEL_FIELDS,
    GenerationRequest,
    GenerationResponse,
    GenerationResponseSample,
    InvalidRequestError,
    LikelyToken,
    Message,
    RequestLimits,
    Token,
)
from flywheel_server.request_checks import checked_request
from flywheel_server.translation import (
    delta_to_proto,
    last_delta_to_proto,
    model_to_proto,
    request_from_proto,
    response_to_proto,
    sample_to_proto,
    stats_to_proto,
)
from flywheel_server.violations import name_of
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fuzz.ranges import (
    CONSTRAINTS,
    FLOAT_MAX,
    PROMPTS,
    Biases,
    Choices,
    Floats,
    Integers,
    Messages,
    Range,
    Repeated,
    Texts,
    ranges,
    with_required,
    wrong_fields,
)
from fuzz.targets import arrived
from tests.cpu_time import check_cpu_time

LIMITS = RequestLimits(
    max_text_bytes=200, max_num_samples=16, context_tokens=8192, supported_fields=frozenset(GenerationRequest.model_fields)
)
INT32 = st.integers(-(2**31), 2**31 - 1)
FLOAT = st.floats(width=32)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)

NATURAL = st.integers(0, 2**31 - 1)
POSITIVE_FLOAT = st.floats(0, width=32, allow_nan=False, allow_infinity=False)
FINITE_FLOAT = st.floats(width=32, allow_nan=False, allow_infinity=False)
ROLE = st.from_regex("[a-z]{1,8}(_[a-z]{1,8})?", fullmatch=True)
RANGES = ranges(LIMITS)
FIELDS = pb.GenerationRequest.DESCRIPTOR.fields


def anything(its: Range) -> st.SearchStrategy[Any]:
    """Returns whatever protobuf lets a field of this kind hold."""
    match its:
        case Integers():
            return INT32
        case Floats():
            return st.floats() if its.highest > FLOAT_MAX else FLOAT
        case Texts():
            return TEXT
        case Repeated():
            return st.lists(anything(its.element), max_size=min(its.max_elements, 64) + 6)
        case Messages():
            return st.lists(st.builds(pb.Message, role=ROLE | TEXT, content=TEXT), max_size=6)
        case Biases():
            return st.dictionaries(INT32, FLOAT, max_size=6)
        case Choices():
            return st.builds(pb.Choices, texts=st.lists(TEXT, max_size=6))


def valid(its: Range) -> st.SearchStrategy[Any]:
    """Returns what the contract accepts of a field with this range."""
    match its:
        case Integers():
            return st.integers(its.lowest, its.highest)
        case Floats():
            return st.floats(its.lowest, its.highest, width=64 if its.highest > FLOAT_MAX else 32)
        case Texts():
            return TEXT.filter(its.accepts)
        case Repeated():
            return st.lists(valid(its.element), max_size=min(its.max_elements, 64))
        case Messages():
            return st.lists(st.builds(pb.Message, role=ROLE, content=TEXT), max_size=6).filter(its.accepts)
        case Biases():
            return st.dictionaries(NATURAL, st.floats(-100, 100, width=32), max_size=6)
        case Choices():
            return st.builds(pb.Choices, texts=st.lists(TEXT.filter(bool), min_size=1, max_size=6, unique=True))


any_fields = st.fixed_dictionaries({}, optional={name: anything(its) for name, its in RANGES.items()})


def valid_fields_with(prompt: str) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {prompt: valid(RANGES[prompt]).filter(bool), "max_tokens": valid(RANGES["max_tokens"])},
        optional={name: valid(its) for name, its in RANGES.items() if name not in {*PROMPTS, "max_tokens"}},
    )


valid_fields = st.sampled_from(PROMPTS).flatmap(valid_fields_with)
tokens = st.builds(
    Token,
    id=NATURAL,
    text=st.binary(max_size=9),
    logprob=FINITE_FLOAT,
    likeliest=st.lists(st.builds(LikelyToken, id=NATURAL, text=st.binary(max_size=9), logprob=FINITE_FLOAT), max_size=2).map(
        tuple
    ),
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
    seed=NATURAL,
    tokens=st.lists(tokens, max_size=3).map(tuple),
)


def token_of(message: pb.Token) -> Token:
    likeliest = tuple(LikelyToken(each.id, each.text, each.logprob) for each in message.likeliest)
    return Token(message.id, message.text, message.logprob, likeliest)


def value_of(message: pb.GenerationResponseSample | pb.GenerationDelta, name: str) -> Any:
    return tuple(map(token_of, message.tokens)) if name == "tokens" else getattr(message, name)


def named(error: InvalidRequestError) -> list[str]:
    """Returns the names of the fields that have violations."""
    return list(dict.fromkeys(map(name_of, error.violations)))


@given(valid_fields)
def test_a_valid_request_arrives_as_it_was_sent(fields: dict[str, Any]) -> None:
    sent = pb.GenerationRequest(**fields)
    request = request_from_proto(pb.GenerationRequest.FromString(sent.SerializeToString()), LIMITS)
    for name, field in GenerationRequest.model_fields.items():
        # A message has only one of the constraints.
        is_sent = name in fields and (name not in CONSTRAINTS or sent.WhichOneof("constraint") == name)
        expected = arrived(fields[name]) if is_sent else field.get_default(call_default_factory=True)
        assert getattr(request, name) == expected


@given(any_fields)
def test_exactly_the_fields_out_of_range_are_named(fields: dict[str, Any]) -> None:
    message = pb.GenerationRequest(**fields)
    wrong = wrong_fields(message, RANGES)
    with pytest.raises(InvalidRequestError) if wrong else nullcontext() as caught:
        request_from_proto(message, LIMITS)
    assert sorted(named(caught.value) if caught else []) == sorted(wrong)


@pytest.mark.parametrize("name", RANGES)
def test_each_range_ends_where_the_range_of_the_contract_ends(name: str) -> None:
    def request(value: Any) -> GenerationRequest:
        return request_from_proto(pb.GenerationRequest(**with_required({name: value})), LIMITS)

    for value in (RANGES[name].lowest, RANGES[name].highest):
        assert getattr(request(value), name) == arrived(value)
    for path, value in RANGES[name].wrong():
        with pytest.raises(InvalidRequestError) as caught:
            request(value)
        assert [violation.field for violation in caught.value.violations] == [name + path]
        assert all(violation.description.startswith("must ") for violation in caught.value.violations)


@pytest.mark.parametrize("names", [("text", "messages"), ("messages", "prompt_token_ids"), PROMPTS])
def test_several_prompts_are_all_named(names: tuple[str, ...]) -> None:
    prompts: dict[str, Any] = {name: RANGES[name].lowest for name in names}
    message = pb.GenerationRequest(max_tokens=1, **prompts)
    with pytest.raises(InvalidRequestError) as caught:
        request_from_proto(message, LIMITS)
    assert named(caught.value) == list(names)
    assert "text, messages and prompt_token_ids" in caught.value.violations[0].description


def test_several_constraints_are_all_named() -> None:
    # A message of the contract cannot have them, but a call of the class on Modal can.
    fields = {"text": "x", "max_tokens": 1, "json_schema": "{}", "regex": "a", "choices": ("a",)}
    with pytest.raises(InvalidRequestError) as caught:
        checked_request(LIMITS, fields)
    assert named(caught.value) == list(CONSTRAINTS)
    with pytest.raises(ValidationError, match="json_schema, regex and choices"):
        GenerationRequest(text="x", max_tokens=1, regex="a", choices=("a",))


def test_fields_that_the_engine_does_not_honour_are_all_named() -> None:
    request = pb.GenerationRequest(text="x", max_tokens=1, seed=1, regex="a", logprobs=1, priority=-1, top_k=0)
    with pytest.raises(InvalidRequestError) as caught:
        request_from_proto(request, replace(LIMITS, supported_fields=FLYWHEEL_FIELDS))
    assert named(caught.value) == caught.value.unsupported == ["seed", "regex", "logprobs"]


@pytest.mark.parametrize("name", [field.name for field in FIELDS if field.has_presence])
def test_unset_is_the_default_and_zero_is_zero(name: str) -> None:
    unset = pb.GenerationRequest(text="x", max_tokens=1)
    assert getattr(request_from_proto(unset, LIMITS), name) == GenerationRequest.model_fields[name].default
    its = RANGES[name]
    zero: Any = pb.Choices() if isinstance(its, Choices) else "" if isinstance(its, Texts) else 0
    message = pb.GenerationRequest(text="x", max_tokens=1, **{name: zero})
    if its.accepts(zero):
        assert getattr(request_from_proto(message, LIMITS), name) == 0
    else:
        with pytest.raises(InvalidRequestError, match=name):
            request_from_proto(message, LIMITS)


@pytest.mark.parametrize("name", [name for name, its in RANGES.items() if isinstance(its, Floats)])
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800001, 0xFFC00000, 0x7F800000, 0xFF800000])
def test_every_kind_of_nan_and_infinity_is_refused(name: str, bits: int) -> None:
    (value,) = struct.unpack(">f", struct.pack(">I", bits))
    with pytest.raises(InvalidRequestError, match=name):
        request_from_proto(pb.GenerationRequest(text="x", max_tokens=1, **{name: value}), LIMITS)


MANY = 400_000
FULL: dict[str, Any] = {
    "eos_token_ids": [-1] * MANY,
    "stop": [""] * MANY,
    "messages": [pb.Message()] * MANY,
    "prompt_token_ids": [-1] * MANY,
    "logit_bias": dict.fromkeys(range(MANY), 200.0),
    "choices": pb.Choices(texts=[""] * MANY),
}


@pytest.mark.parametrize("name", FULL)
def test_a_message_full_of_bad_elements_is_refused_at_once(name: str) -> None:
    """To check each element takes seconds, on the event loop."""
    message = pb.GenerationRequest(**with_required({name: FULL[name]}))

    def refuse() -> None:
        with pytest.raises(InvalidRequestError) as caught:
            request_from_proto(message, LIMITS)
        assert named(caught.value) == [name]

    check_cpu_time(0.1, refuse)


@given(samples)
def test_a_sample_goes_out_whole(sample: GenerationResponseSample) -> None:
    message = pb.GenerationResponseSample.FromString(sample_to_proto(sample).SerializeToString())
    assert (
        GenerationResponseSample.model_validate(
            {field.name: value_of(message, field.name) for field in message.DESCRIPTOR.fields}
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
    message = last_delta_to_proto(sample, rest, sample.tokens)
    assert message.text == rest
    for field in message.DESCRIPTOR.fields:
        if field.name != "text":
            assert value_of(message, field.name) == getattr(sample, field.name)


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
    assert set(model.supported_fields) == FLYWHEEL_FIELDS | {"priority"}
    assert not model.exact_seeds
    stats = stats_to_proto(EngineStats(backlog=3, num_total_runners=2), active=4, queued=5)
    assert stats == pb.Stats(backlog=3, num_total_runners=2, active=4, queued=5)


def test_the_models_have_the_fields_of_the_contract() -> None:
    for model in (GenerationRequest, Message, GenerationResponseSample, GenerationResponse):
        message = pb.DESCRIPTOR.message_types_by_name[model.__name__]
        assert list(model.model_fields) == [field.name for field in message.fields]
    assert list(RANGES) == [field.name for field in FIELDS]


def test_the_stated_defaults_are_those_of_the_fields_with_presence() -> None:
    with_default = [name for name, field in GenerationRequest.model_fields.items() if field.default is not None]
    with_presence = {field.name for field in FIELDS if field.has_presence}
    stated = [field.name for field in pb.Defaults.DESCRIPTOR.fields]
    assert stated == [name for name in with_default if name in with_presence]
