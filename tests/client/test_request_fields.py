"""The fields of requests and results: what callers pass arrives, and what servers send comes back."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import grpc
import pydantic
import pytest
from flywheel_client import Client, GenerationFields, LikelyToken, Message, PromptToken, Token, Tokens, UnavailableError
from flywheel_proto.v1 import generation_pb2
from google.rpc.error_details_pb2 import ErrorInfo

from tests.client.conftest import delta, sample

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.client.conftest import Caller, FakeService

FIELDS = generation_pb2.GenerationRequest.DESCRIPTOR.fields_by_name

VALUES: dict[str, Any] = {
    "max_tokens": 256,
    "eos_token_ids": [2, 2**31 - 1],
    "max_input_tokens": 9,
    "num_samples": 16,
    "stop": ["END", "é"],
    "temperature": 0.5,
    "top_k": 7,
    "top_p": 0.25,
    "presence_penalty": -2,
    "frequency_penalty": 2,
    "seed": 2**31 - 1,
    "min_p": 0.125,
    "repetition_penalty": 1.5,
    "logit_bias": {5: -100, 6: 0.5},
    "json_schema": '{"type": "object"}',
    "logprobs": 20,
    "time_limit": 1.5,
    "priority": -1000,
}
"""A value of each field, without the fields that exclude each other."""

CONVERSATION = [{"role": "system", "content": ""}, {"role": "user", "content": "Grüße"}]


@pytest.fixture
def client(fake: FakeService) -> Iterator[Client]:
    with Client(fake.address) as client:
        yield client


@pytest.mark.parametrize("prompt", [{"text": "p"}, {"messages": CONVERSATION}, {"prompt_token_ids": [1, 0, 5]}])
def test_every_field_arrives(fake: FakeService, client: Client, prompt: dict[str, Any]) -> None:
    client.generate_all(**prompt, **VALUES)
    list(client.generate(**prompt, **VALUES))
    list(client.generate_deltas(**prompt, **VALUES))
    assert fake.requests == [generation_pb2.GenerationRequest(**prompt, **VALUES)] * 3
    assert {"text", *GenerationFields.__annotations__} == set(FIELDS)
    assert {*VALUES, "text", "messages", "prompt_token_ids", "regex", "choices"} == set(FIELDS)


def test_zero_is_not_unset(fake: FakeService, client: Client) -> None:
    numbers = [name for name, field in FIELDS.items() if field.has_presence and field.type != field.TYPE_STRING]
    numbers.remove("choices")
    nothing, zeros = (dict[str, Any].fromkeys(names, value) for names, value in (({*FIELDS} - {"text"}, None), (numbers, 0)))
    client.generate_all("p", **nothing | {"max_tokens": 1})
    client.generate_all("p", max_tokens=1, **zeros)
    unset, zero = fake.requests
    assert unset == generation_pb2.GenerationRequest(text="p", max_tokens=1)
    assert {"seed", "repetition_penalty", "num_samples"} <= {*numbers}
    for name in numbers:
        assert zero.HasField(name)  # type: ignore[arg-type]
        assert getattr(zero, name) == 0


def test_an_empty_constraint_is_not_unset(fake: FakeService, client: Client) -> None:
    constraints: dict[str, Any] = {"json_schema": "", "regex": "", "choices": []}
    for name, value in constraints.items():
        client.generate_all("p", max_tokens=1, **{name: value})
        assert fake.requests[-1].WhichOneof("constraint") == name


@pytest.mark.parametrize("kind", [dict, Message, tuple])
def test_a_conversation_may_be_of_several_types(fake: FakeService, client: Client, kind: type) -> None:
    makers: dict[type, Callable[[dict[str, str]], Any]] = {
        dict: dict,
        Message: lambda message: Message(**message),
        tuple: lambda message: (message["role"], message["content"]),
    }
    client.generate_all(messages=(makers[kind](message) for message in CONVERSATION), max_tokens=1)
    assert fake.requests == [generation_pb2.GenerationRequest(messages=CONVERSATION, max_tokens=1)]  # type: ignore[arg-type]


def test_constraints(fake: FakeService, client: Client) -> None:
    class Llama(pydantic.BaseModel):
        name: str

    schema = Llama.model_json_schema()
    client.generate_all("p", max_tokens=1, json_schema=schema)
    assert Llama.model_json_schema() == pydantic.TypeAdapter(dict[str, Any]).validate_json(fake.requests[-1].json_schema)
    client.generate_all("p", max_tokens=1, json_schema={"const": "é"})
    assert fake.requests[-1].json_schema == '{"const": "é"}'
    client.generate_all("p", max_tokens=1, regex="a|b")
    assert fake.requests[-1].regex == "a|b"
    client.generate_all("p", max_tokens=1, choices=(word for word in ("yes", "no")))
    assert list(fake.requests[-1].choices.texts) == ["yes", "no"]


LOOP: dict[str, Any] = {}
LOOP["properties"] = LOOP


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"max_tokens": 2**40}, ValueError, "max_tokens"),
        ({"max_tokens": "7"}, TypeError, "max_tokens"),
        ({"max_tokens": None}, TypeError, "max_tokens is required"),
        ({"text": None}, TypeError, "a prompt is required: text, messages or prompt_token_ids"),
        ({"text": "\ud800"}, ValueError, "text cannot be encoded"),
        ({"text": 5}, TypeError, "text"),
        ({"stop": "END"}, TypeError, "stop must be a sequence"),
        ({"stop": ["\ud800"]}, ValueError, "stop"),
        ({"eos_token_ids": 2}, TypeError, "eos_token_ids"),
        ({"eos_token_ids": [2**31]}, ValueError, "eos_token_ids"),
        ({"top_p": "all"}, TypeError, "top_p"),
        ({"temprature": 1.0}, TypeError, "temprature is not a field"),
        ({"request_id": ""}, ValueError, "request_id"),
        ({"request_id": "ü"}, ValueError, "request_id"),
        ({"request_id": "x" * 129}, ValueError, "request_id"),
        ({"messages": "Hello"}, TypeError, "messages must be a sequence"),
        ({"messages": 5}, TypeError, "messages has the wrong type"),
        ({"messages": ["ab"]}, TypeError, r"messages\[0\] must be a Message, a mapping"),
        ({"messages": {"role": "user", "content": ""}}, TypeError, r"messages\[0\] must be a Message, a mapping"),
        ({"messages": [("user", "a", "b")]}, TypeError, r"messages\[0\] must be a Message, a mapping"),
        ({"messages": [("user", ""), {"role": "user"}]}, TypeError, r"messages\[1\]\.content is missing"),
        ({"messages": [{"role": "a", "content": "", "name": ""}]}, TypeError, r"messages\[0\]\.name is not a field"),
        ({"messages": [("user", None)]}, TypeError, r"messages\[0\]\.content has the wrong type"),
        ({"messages": [Message("user", "\ud800")]}, ValueError, r"messages\[0\]\.content cannot be encoded"),
        ({"prompt_token_ids": [-(2**40)]}, ValueError, "prompt_token_ids"),
        ({"logit_bias": {"5": 1}}, TypeError, "logit_bias"),
        ({"logit_bias": {2**40: 1}}, ValueError, "logit_bias"),
        ({"logit_bias": [5]}, TypeError, "logit_bias"),
        ({"json_schema": pydantic.BaseModel}, TypeError, "json_schema has the wrong type: .* MyModel.model_json_schema()"),
        ({"json_schema": {"enum": [object()]}}, TypeError, "json_schema"),
        ({"json_schema": {"enum": [float("nan")]}}, ValueError, "json_schema"),
        ({"json_schema": LOOP}, ValueError, "json_schema"),
        ({"choices": "yes"}, TypeError, "choices must be a sequence"),
        ({"choices": [1]}, TypeError, "choices"),
        ({"choices": ["a"], "regex": "a"}, TypeError, "only one of regex and choices"),
        ({"seed": 0.5}, TypeError, "seed"),
        ({"temperature": 10**400}, ValueError, "temperature: "),
        ({"time_limit": -(10**400)}, ValueError, "time_limit: "),
        ({"logit_bias": {1: 10**400}}, ValueError, "logit_bias: "),
        ({"max_tokens": 10**400}, ValueError, "max_tokens: "),
    ],
)
def test_values_that_no_message_can_hold_name_their_field(
    client: Client, fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        client.generate(**{"text": "p", "max_tokens": 1, **fields})


TOKENS = [
    generation_pb2.Token(
        id=5, text=b"\xc3", logprob=-0.5, likeliest=[generation_pb2.LikelyToken(id=6, text=b"a", logprob=-0.25)]
    ),
    generation_pb2.Token(id=2, logprob=-1),
]
TYPED = (Token(5, b"\xc3", -0.5, (LikelyToken(6, b"a", -0.25),)), Token(2, b"", -1.0))


async def test_samples_and_deltas_have_a_seed_and_tokens(caller: Callable[..., Caller], fake: FakeService) -> None:
    one = caller(fake.address)
    fake.samples, fake.deltas = [sample("a")], [delta("a", finish_reason="stop")]
    both: list[Any] = [fake.samples[0], fake.deltas[0]]
    for message in both:
        message.seed = 7
        message.tokens.extend(TOKENS)
    response = await one.ask(one.client.generate_all, "p", max_tokens=1)
    stream = await one.stream()
    last = await (anext(stream) if one.is_async else one.ask(next, stream))
    for result in (*response.responses, last):
        assert (result.seed, result.tokens) == (7, TYPED)


async def test_a_prompt_is_tokenized(caller: Callable[..., Caller], fake: FakeService) -> None:
    one = caller(fake.address)
    expected = Tokens(2, (PromptToken(0, b"Once"), PromptToken(1, "é".encode())))
    assert await one.ask(one.client.tokenize, "Once é", request_id="mine") == expected
    assert await one.ask(one.client.tokenize, messages=[("user", "a")]) == Tokens(0, ())
    with pytest.raises(TypeError, match="a prompt is required: text or messages"):
        await one.ask(one.client.tokenize)
    with pytest.raises(TypeError, match=r"messages\[0\]\.role is missing"):
        await one.ask(one.client.tokenize, messages=[{}])
    fake.fail(grpc.StatusCode.UNAVAILABLE, "stopping", ErrorInfo(reason="ENGINE_UNAVAILABLE", domain="flywheel.v1"))
    with pytest.raises(UnavailableError, match="stopping"):
        await one.ask(one.client.tokenize, "p", timeout=1)


def test_an_older_server_can_be_told(fake: FakeService, client: Client) -> None:
    assert "json_schema" in client.model().supported_fields
    fake.supported_fields = ()
    model = client.model()
    assert (model.supported_fields, model.exact_seeds) == ((), False)
    assert {name: value for name, value in dataclasses.asdict(model.limits).items() if not value} == dict.fromkeys(
        ["max_messages", "max_logit_bias", "max_constraint_bytes", "max_choices", "max_logprobs"], 0
    )
