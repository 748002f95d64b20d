"""What the answers of servers are compared with: the oracle sees each promise that is broken."""

from collections.abc import Callable, Sequence

import grpc
import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from google.rpc.status_pb2 import Status

from fuzz.answers import Answer

REQUEST = pb.GenerationRequest(text="x", max_tokens=3, num_samples=2, stop=["END"])
Sample = pb.GenerationResponseSample
Delta = pb.GenerationDelta


def sample(index: int, text: str = "abc", tokens: int = 3, reason: str = "length", stop: str = "") -> Sample:
    return Sample(index=index, text=text, generated_tokens=tokens, finish_reason=reason, stop_sequence=stop, prompt_tokens=1)


def is_right(method: str, messages: Sequence[Sample | Delta | pb.GenerationResponse]) -> bool:
    data = [message.SerializeToString() for message in messages]
    return Answer(grpc.StatusCode.OK, Status(), 1, data).is_for(method, REQUEST.SerializeToString())


def in_whole(samples: Sequence[Sample]) -> bool:
    return is_right("Generate", samples)


def in_deltas(samples: Sequence[Sample]) -> bool:
    messages = []
    for one in samples:
        messages.append(Delta(index=one.index, text="a", generated_tokens=1))
        fields = {field.name: value for field, value in one.ListFields()} | {"text": one.text[1:]}
        messages.append(Delta(**fields))
    return is_right("GenerateDeltas", messages)


def in_one(samples: Sequence[Sample]) -> bool:
    return is_right("GenerateAll", [pb.GenerationResponse(num_samples=len(samples), responses=samples, prompt_tokens=1)])


BROKEN = {
    "a sample is missing": [sample(0)],
    "a sample comes twice": [sample(0), sample(1), sample(1)],
    "one too many": [sample(0), sample(1), sample(2)],
    "too many tokens": [sample(0), sample(1, tokens=4)],
    "too few tokens": [sample(0), sample(1, tokens=2)],
    "a reason that there is not": [sample(0), sample(1, reason="whim")],
    "a stop sequence in the text": [sample(0), sample(1, text="aEND", tokens=2, reason="stop", stop="END")],
    "a stop sequence that was not asked for": [sample(0), sample(1, tokens=2, reason="stop", stop="other")],
}


@pytest.mark.parametrize("sent", [in_whole, in_deltas, in_one])
def test_promises(sent: Callable[[Sequence[Sample]], bool]) -> None:
    assert sent([sample(0), sample(1, tokens=2, reason="stop", stop="END")])
    assert [what for what, samples in BROKEN.items() if sent(samples)] == []


def test_order_of_deltas() -> None:
    early, last = (
        Delta(index=0, text="a", generated_tokens=1),
        Delta(index=0, text="bc", generated_tokens=3, finish_reason="length", prompt_tokens=1),
    )
    other = Delta(index=1, text="abc", generated_tokens=3, finish_reason="length", prompt_tokens=1)
    assert is_right("GenerateDeltas", [early, other, last])
    assert not is_right("GenerateDeltas", [last, early, other]), "text after the end of its sample"
    assert not is_right("GenerateDeltas", [Delta(index=0, generated_tokens=1), last, other]), "a delta without text"
