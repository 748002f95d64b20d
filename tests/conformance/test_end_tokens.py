"""Tokens with which a request lets samples end: they never leave the beginning of a text that a constraint asks for."""

import json
import re
from collections.abc import Mapping
from typing import Any, Final

import pytest
from flywheel_proto.v1 import generation_pb2 as pb

from tests.conformance.test_fields import Samples, answer
from tests.conformance.test_requests import METHODS
from tests.serving import Target
from tests.thorough import further

MAX_TRIED: Final = 4
"""How many tokens of a sample are tried as end tokens."""
REQUEST: Final[Mapping[str, Any]] = {"text": "1", "max_tokens": 40, "seed": 3, "logprobs": 1}
CONSTRAINTS: Final[Mapping[str, tuple[dict[str, Any], str]]] = {
    "choices": ({"choices": pb.Choices(texts=["yes, it is", "no, it is not"])}, "yes, it is|no, it is not"),
    "choice within a choice": (
        {"choices": pb.Choices(texts=["ten", "ten thousand", "ten thousand and one"])},
        "ten( thousand( and one)?)?",
    ),
    "regex": ({"regex": "[0-9]{3}-[0-9]{3}"}, "[0-9]{3}-[0-9]{3}"),
    "regex that may end early": ({"regex": "[a-z]{2,12}"}, "[a-z]{2,12}"),
    "json_schema": (
        {"json_schema": json.dumps({"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]})},
        r'\{"a": (true|false)\}',
    ),
    "json_schema of a number": (
        {"json_schema": json.dumps({"type": "integer", "minimum": 10, "maximum": 9999999})},
        "[1-9][0-9]{1,6}",
    ),
}
ALL_CASES: Final = [(name, method) for name in CONSTRAINTS for method in METHODS]
CASES: Final = [("choice within a choice", "Generate")]


async def samples(target: Target, method: str, **fields: Any) -> Samples:
    return await answer(target, method, pb.GenerationRequest(**REQUEST, **fields))


@pytest.mark.parametrize("case", [*CASES, *further(ALL_CASES, but=CASES)], ids="-".join)
async def test_an_end_token_leaves_no_beginning_of_a_constrained_text(target: Target, case: tuple[str, str]) -> None:
    name, method = case
    constraint, form = CONSTRAINTS[name]
    model = await target.stub.GetModel(pb.GetModelRequest())
    if not {"logprobs", *constraint} <= {*model.supported_fields}:
        pytest.skip("the server refuses the fields")
    (whole,) = await samples(target, method, **constraint)
    assert (whole.finish_reason, bool(re.fullmatch(form, whole.text))) == ("stop", True)
    for token in whole.tokens[:MAX_TRIED]:
        (sample,) = await samples(target, method, **constraint, eos_token_ids=[token.id])
        assert (sample.finish_reason, sample.stop_sequence) == ("stop", "")
        assert re.fullmatch(form, sample.text), (token.text, sample.text)
        if model.exact_seeds:
            assert sample.text == text_until(whole, token.id, form)


def text_until(whole: pb.GenerationResponseSample, token_id: int, form: str) -> str:
    """Returns the text before the first such token that comes where the text has the form; the whole text if there is none."""
    text = ""
    for token in whole.tokens:
        if token.id == token_id and re.fullmatch(form, text):
            break
        text += token.text.decode()
    return text
