"""Each field of a request, in each method: honoured if the server says that it supports the field, else refused by name.

`make conformance` prints the results as a table. A new field needs one line in `CASES`.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
import grpc.aio
import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.messages import FLYWHEEL_FIELDS
from google.rpc.error_details_pb2 import ErrorInfo

from fuzz.ranges import with_required
from tests.conformance.test_requests import METHODS, bad_request
from tests.server.test_errors import details_of
from tests.serving import Target, drained
from tests.thorough import further

Samples = list[pb.GenerationResponseSample]


def are_finished(samples: Samples) -> bool:
    """Returns whether there is an answer; all that can be said of a field that changes only probabilities."""
    return all(sample.finish_reason for sample in samples)


@dataclass(frozen=True)
class Case:
    """A request that has a field, and whether its samples show that the field was honoured."""

    fields: Mapping[str, Any]
    is_honoured: Callable[[Samples], bool] = are_finished
    required: Mapping[str, Any] = field(default_factory=lambda: {"max_tokens": 8})

    def request(self) -> pb.GenerationRequest:
        return pb.GenerationRequest(**with_required({**self.required, **self.fields}))


def are(pattern: str) -> Callable[[Samples], bool]:
    return lambda samples: all(re.fullmatch(pattern, sample.text) for sample in samples)


def have_tokens(samples: Samples) -> bool:
    """Returns whether the tokens of each sample are its text, each with two likely ones."""
    return all(
        sample.tokens
        and b"".join(token.text for token in sample.tokens).decode(errors="replace").startswith(sample.text)
        and all(-math.inf < token.logprob <= 0 and len(token.likeliest) == 2 for token in sample.tokens)
        for sample in samples
    )


STORY: Final = {"text": "Write a very long story about a llama."}
CASES: Final[Mapping[str, Case]] = {
    "text": Case({"text": "Hello"}, lambda samples: all(sample.prompt_tokens for sample in samples)),
    "max_tokens": Case({"max_tokens": 3}, lambda samples: all(sample.generated_tokens <= 3 for sample in samples)),
    "eos_token_ids": Case({"eos_token_ids": [5]}),
    "max_input_tokens": Case(STORY | {"max_input_tokens": 2}, lambda samples: all(each.prompt_tokens == 2 for each in samples)),
    "num_samples": Case({"num_samples": 2}, lambda samples: [sample.index for sample in samples] == [0, 1]),
    "stop": Case({"stop": ["e"]}, lambda samples: not any("e" in sample.text for sample in samples)),
    "temperature": Case({"temperature": 0.0}),
    "top_k": Case({"top_k": 1}),
    "top_p": Case({"top_p": 0.5}),
    "presence_penalty": Case({"presence_penalty": 1.0}),
    "frequency_penalty": Case({"frequency_penalty": 1.0}),
    "messages": Case(
        {"messages": [pb.Message(role="user", content="Hello")]}, lambda samples: all(each.prompt_tokens for each in samples)
    ),
    "prompt_token_ids": Case({"prompt_token_ids": [5, 6, 7]}, lambda samples: all(each.prompt_tokens == 3 for each in samples)),
    "seed": Case({"seed": 7, "num_samples": 2}, lambda samples: [sample.seed for sample in samples] == [7, 8]),
    "min_p": Case({"min_p": 0.1}),
    "repetition_penalty": Case({"repetition_penalty": 1.1}),
    "logit_bias": Case({"logit_bias": {5: -100.0}}),
    "json_schema": Case({"json_schema": json.dumps({"enum": ["yes", "no"]})}, are('"(yes|no)"')),
    "regex": Case({"regex": "[ab]{3}"}, are("[ab]{3}")),
    "choices": Case({"choices": pb.Choices(texts=["left", "right"])}, are("left|right")),
    "logprobs": Case({"logprobs": 2}, have_tokens),
    "time_limit": Case(
        STORY | {"time_limit": 0.05, "max_tokens": 4000}, lambda samples: {each.finish_reason for each in samples} == {"time"}
    ),
    "priority": Case({"priority": -5}),
}
"""A case of each field."""
TOKENIZED: Final = ("text", "messages")
"""The fields of a TokenizeRequest."""

CELLS: Final = [(name, method) for name in CASES for method in METHODS] + [(name, "Tokenize") for name in TOKENIZED]
"""The rows of the table: each field, in each method that has it."""
TRIED: Final = [(name, METHODS[number % len(METHODS)]) for number, name in enumerate(CASES)] + CELLS[-len(TOKENIZED) :]
"""The rows that `make test` tries."""


def test_there_is_a_case_of_each_field() -> None:
    assert list(CASES) == [each.name for each in pb.GenerationRequest.DESCRIPTOR.fields]
    assert list(TOKENIZED) == [each.name for each in pb.TokenizeRequest.DESCRIPTOR.fields]


@pytest.mark.parametrize("cell", [*TRIED, *further(CELLS, but=TRIED)], ids="-".join)
async def test_a_field_is_honoured_or_refused_by_name(
    target: Target, cell: tuple[str, str], request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> None:
    name, method = cell
    record_property("cell", (name, method, request.node.callspec.params["target"]))
    supported = (await target.stub.GetModel(pb.GetModelRequest())).supported_fields or FLYWHEEL_FIELDS
    if method == "Tokenize":
        result = await tokenized(target, name, is_supported=name in supported)
    elif name in supported:
        samples = await answer(target, method, CASES[name].request())
        assert CASES[name].is_honoured(samples), samples
        result = "honoured"
    else:
        await assert_refused(getattr(target.stub, method)(CASES[name].request()), name)
        result = "refused"
    record_property("result", result)


async def tokenized(target: Target, name: str, *, is_supported: bool) -> str:
    """Checks the tokens of the prompt of a case, if the engine can tell them. Returns the result."""
    generation = CASES[name].request()
    call = target.stub.Tokenize(pb.TokenizeRequest(text=generation.text, messages=generation.messages))
    if not is_supported:
        await assert_refused(call, name)
        return "refused"
    try:
        response = await call
    except grpc.aio.AioRpcError as error:
        if (error.code(), reason_of(error)) == (grpc.StatusCode.UNIMPLEMENTED, "UNSUPPORTED_METHOD"):
            return "refused"
        raise
    assert len(response.tokens) == response.prompt_tokens
    assert response.prompt_tokens == (await target.stub.GenerateAll(generation)).prompt_tokens
    return "honoured"


async def assert_refused(call: Any, name: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await drained(call)
    assert reason_of(caught.value) == "UNSUPPORTED_FIELD"
    assert name in bad_request(caught.value)


def reason_of(error: grpc.aio.AioRpcError) -> str:
    return str(details_of(error)[ErrorInfo].reason)


async def answer(target: Target, method: str, request: pb.GenerationRequest) -> Samples:
    """Returns the samples that the method answers with, in the order of their index."""
    call = getattr(target.stub, method)(request)
    if method == "GenerateAll":
        return list((await call).responses)
    samples: dict[int, pb.GenerationResponseSample] = defaultdict(pb.GenerationResponseSample)
    async for message in call:
        sample = samples[message.index]
        # A sample and a delta have fields of the same names. The last delta has all but the text and tokens before it.
        for its, value in message.ListFields():
            match its.name:
                case "text":
                    sample.text += value
                case "tokens":
                    sample.tokens.extend(value)
                case name:
                    setattr(sample, name, value)
    return [samples[index] for index in sorted(samples)]
