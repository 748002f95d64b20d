"""The likeliest tokens at each place of a text: as many as the request asks for, whatever else it asks for."""

from typing import Any, Final

import pytest
from flywheel_proto.v1 import generation_pb2 as pb

from tests.conformance.test_fields import answer
from tests.conformance.test_requests import METHODS
from tests.serving import Target
from tests.thorough import further

ELSE: Final[dict[str, dict[str, Any]]] = {
    "nothing": {},
    "top_k": {"top_k": 1},
    "choices": {"choices": pb.Choices(texts=["a", "it is"])},
    "stop": {"stop": ["e"]},
}
CASES: Final = [(name, logprobs, method) for name in ELSE for logprobs in (1, 7, 20) for method in METHODS]
TRIED: Final = [("nothing", 20, "Generate"), ("choices", 20, "GenerateAll"), ("top_k", 7, "GenerateDeltas")]


@pytest.mark.parametrize("case", [*TRIED, *further(CASES, but=TRIED)], ids=lambda case: "-".join(map(str, case)))
async def test_there_are_as_many_likely_tokens_as_the_request_asks_for(target: Target, case: tuple[str, int, str]) -> None:
    name, logprobs, method = case
    supported = (await target.stub.GetModel(pb.GetModelRequest())).supported_fields
    if not {"logprobs", *ELSE[name]} <= {*supported}:
        pytest.skip("the server refuses the fields")
    request = pb.GenerationRequest(text="Tell me about llamas.", max_tokens=6, num_samples=2, logprobs=logprobs, **ELSE[name])
    for sample in await answer(target, method, request):
        assert sample.tokens
        for token in sample.tokens:
            assert len({likely.id for likely in token.likeliest}) == len(token.likeliest) == logprobs
            probabilities = [likely.logprob for likely in token.likeliest]
            assert probabilities == sorted(probabilities, reverse=True)
