"""The default model generates what constraints allow, at temperature 1."""

import json
import re
from typing import Any

import jsonschema
import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.engines.llama_cpp.constraints.grammars import grammar_of
from flywheel_server.engines.llama_cpp.constraints.guard import ConstraintGuard

from tests.serving import Target
from tests.thorough import further

SAMPLES = 10
MAX_TOKENS = 48

TEXT = {"type": "string", "maxLength": 12}
COLOR = {"enum": ["red", "green", "blue"]}
SCHEMAS: dict[str, Any] = {
    "boolean": {"type": "boolean"},
    "null or integer": {"type": ["null", "integer"]},
    "integer in a range": {"type": "integer", "minimum": -5, "maximum": 250},
    "number in a range": {"type": "number", "exclusiveMinimum": 0, "maximum": 1.5},
    "multiple": {"type": "number", "multipleOf": 0.25, "minimum": 0, "maximum": 100},
    "text": TEXT,
    "length": {"type": "string", "minLength": 3, "maxLength": 5},
    "pattern": {"type": "string", "pattern": "^[A-Z][a-z]{2,8}( [A-Z][a-z]{2,8})?$"},
    "found pattern": {"type": "string", "pattern": "[0-9]", "maxLength": 10},
    "date": {"type": "string", "format": "date"},
    "time": {"type": "string", "format": "time", "maxLength": 12},
    "uuid": {"type": "string", "format": "uuid"},
    "ipv4": {"type": "string", "format": "ipv4"},
    "email": {"type": "string", "format": "email", "maxLength": 20},
    "enum": COLOR,
    "const": {"const": {"a": [1, None, "é\n"]}},
    "array": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "minItems": 2, "maxItems": 4},
    "tuple": {"type": "array", "prefixItems": [COLOR, {"type": "boolean"}], "items": False, "minItems": 2},
    "array of any": {"type": "array", "maxItems": 2, "items": {"type": ["boolean", "null"]}},
    "object": {"type": "object", "properties": {"name": TEXT, "age": {"type": "integer", "minimum": 0, "maximum": 130}}},
    "required": {"type": "object", "properties": {"b": COLOR, "a": COLOR}, "required": ["a"]},
    "open object": {
        "type": "object",
        "properties": {"a": COLOR},
        "additionalProperties": {"type": "boolean"},
        "maxProperties": 3,
    }
    | {"required": ["a"]},
    "map": {"type": "object", "additionalProperties": COLOR, "minProperties": 1, "maxProperties": 2},
    "pattern properties": {
        "type": "object",
        "patternProperties": {"^[a-c]{1,3}$": {"type": "integer", "maximum": 9}},
        "maxProperties": 2,
    }
    | {"minProperties": 1},
    "at least one": {"type": "object", "properties": {"a": COLOR, "b": COLOR}, "minProperties": 1},
    "alternatives": {"anyOf": [{"type": "object", "properties": {"a": COLOR}, "required": ["a"]}, {"type": "null"}, COLOR]},
    "either": {"oneOf": [{"type": "boolean"}, {"type": "array", "items": COLOR, "maxItems": 2}]},
    "discriminated": {
        "oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}],
        "discriminator": {"propertyName": "kind"},
        "$defs": {
            "Cat": {"type": "object", "properties": {"kind": {"const": "cat"}, "color": COLOR}, "required": ["kind", "color"]},
            "Dog": {
                "type": "object",
                "properties": {"kind": {"const": "dog"}, "good": {"type": "boolean"}},
                "required": ["kind"],
            },
        },
    },
    "tree": {
        "$ref": "#/$defs/Node",
        "$defs": {
            "Node": {
                "type": "object",
                "properties": {"c": COLOR, "next": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]}},
                "required": ["c", "next"],
            }
        },
    },
    "anything": {"type": ["array", "object"]},
}


MAY_NOT_END = ("tree", "anything", "null or integer")
"""The schemas whose documents may be too long for `MAX_TOKENS`, all of them."""


async def generated(target: Target, method: str, request: pb.GenerationRequest) -> list[pb.GenerationResponseSample]:
    """Returns the samples, whose texts are the joined deltas if the method streams them."""
    if method == "GenerateAll":
        return list((await target.stub.GenerateAll(request)).responses)
    texts = [""] * request.num_samples
    ends: list[pb.GenerationResponseSample] = []
    async for delta in target.stub.GenerateDeltas(request):
        texts[delta.index] += delta.text
        if delta.finish_reason:
            ends.append(
                pb.GenerationResponseSample(
                    text=texts[delta.index], finish_reason=delta.finish_reason, stop_sequence=delta.stop_sequence
                )
            )
    return ends


@pytest.mark.parametrize("name", ["required", *further(SCHEMAS, but=["required"])])
async def test_finished_documents_are_as_the_schema_says(embedded_target: Target, name: str) -> None:
    schema = json.dumps(SCHEMAS[name])
    grammar = grammar_of(schema, None, None)
    validator = jsonschema.Draft202012Validator(SCHEMAS[name])
    request = pb.GenerationRequest(
        text=f"Answer in JSON: {schema}", max_tokens=MAX_TOKENS, temperature=1.0, top_k=0, num_samples=2, json_schema=schema
    )
    finished = 0
    for number in range(SAMPLES // 2):
        del request.stop[:]
        request.stop.extend(["e", "9"] if number == 1 else [])
        for sample in await generated(embedded_target, ("GenerateAll", "GenerateDeltas")[number % 2], request):
            guard = ConstraintGuard(grammar)
            assert guard.accepts(sample.text), sample
            if sample.finish_reason == "stop" and not sample.stop_sequence:
                validator.validate(json.loads(sample.text))
                finished += 1
            else:
                assert sample.stop_sequence or sample.finish_reason == "length", sample
    assert finished or name in MAY_NOT_END


@pytest.mark.parametrize("regex", ["^[ab]{2}$", r"\A[ab]{2}\z", "^[ab]{2}", r"[ab]{2}\z", "^ab$|^ba$"])
async def test_a_text_has_no_more_than_an_anchored_expression(embedded_target: Target, regex: str) -> None:
    request = pb.GenerationRequest(text="a", max_tokens=8, regex=regex, num_samples=4)
    for sample in (await embedded_target.stub.GenerateAll(request)).responses:
        assert sample.finish_reason == "stop"
        assert re.fullmatch("[ab]{2}", sample.text)


SPECIAL: dict[str, dict[str, Any]] = {
    "choice": {"choices": pb.Choices(texts=["<|im_end|>"])},
    "choices": {"choices": pb.Choices(texts=["<|im_end|>b", "<|endoftext|>", "a<repo_name>"])},
    "const": {"json_schema": '{"const": "<|im_start|>"}'},
    "enum": {"json_schema": '{"enum": ["see <file_sep> x"]}'},
    "property": {
        "json_schema": '{"type": "object", "properties": {"<filename>": {"type": "boolean"}}, "required": ["<filename>"]}'
    },
    "pattern": {"json_schema": '{"type": "string", "pattern": "^<gh_stars>[a-z]{2}$"}'},
    "regex": {"regex": "<repo_name>[a-z]{3}"},
    "in the middle of a regex": {"regex": "[ab]<[|]im_end[|]>[ab]"},
}


@pytest.mark.parametrize("name", SPECIAL)
async def test_the_text_of_a_special_token_is_generated_as_text(embedded_target: Target, name: str) -> None:
    given = SPECIAL[name]
    choices = list(given["choices"].texts) if "choices" in given else None
    grammar = grammar_of(given.get("json_schema"), given.get("regex"), choices)
    sample = (await embedded_target.stub.GenerateAll(pb.GenerationRequest(text="Hello", max_tokens=40, **given))).responses[0]
    guard = ConstraintGuard(grammar)
    assert sample.finish_reason == "stop"
    assert guard.accepts(sample.text)
    assert guard.is_complete()
