"""The default model generates what constraints allow, at temperature 1."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from flywheel_server.engines.llama_cpp.constraints.grammars import grammar_of
from flywheel_server.engines.llama_cpp.constraints.guard import ConstraintGuard
from flywheel_server.engines.llama_cpp.default_model import default_model
from flywheel_server.engines.llama_cpp.llama import Chunk, Llama

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


@pytest.fixture(scope="module")
def llama() -> Iterator[Llama]:
    llama = Llama(default_model(), context_tokens=4096, slots=4, threads=1, batch_tokens=64)
    yield llama
    llama.close()


def generate(llama: Llama, grammar: str, prompt: str, samples: int) -> list[tuple[str, str]]:
    """Returns the text and the finish reason of each sample."""
    texts, reasons, errors = [""] * samples, [""] * samples, []

    def on_chunk(chunk: Chunk) -> bool:
        if error := chunk.get("error"):
            errors.append(error)
            return True
        choice = chunk["choices"][0]
        texts[choice["index"]] += choice["text"]
        reasons[choice["index"]] = choice["finish_reason"] or ""
        return False

    body = {"prompt": llama.tokenize(prompt), "n": samples, "max_tokens": MAX_TOKENS, "temperature": 1.0, "stream": True}
    llama.complete(body | {"grammar": grammar, "samplers": ["temperature"], "min_p": 0.0}, on_chunk)
    assert errors == []
    return list(zip(texts, reasons, strict=True))


@pytest.mark.parametrize("name", ["discriminated", *further(SCHEMAS, but=["discriminated"])])
async def test_finished_documents_are_as_the_schema_says(llama: Llama, name: str) -> None:
    schema = SCHEMAS[name]
    grammar = grammar_of(json.dumps(schema), "", ())
    assert grammar
    validator = jsonschema.Draft202012Validator(schema)
    prompt = f"<|im_start|>user\nAnswer in JSON: {json.dumps(schema)}<|im_end|>\n<|im_start|>assistant\n"
    done = 0
    for _ in range(0, SAMPLES, 2):
        for text, reason in await asyncio.to_thread(generate, llama, grammar, prompt, 2):
            guard = ConstraintGuard(grammar)
            assert guard.accepts(text), text
            assert guard.is_complete() or reason == "length"
            if reason == "stop":
                validator.validate(json.loads(text))
                done += 1
    assert done or name in ("tree", "anything")
