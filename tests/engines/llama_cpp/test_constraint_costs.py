"""A constraint is checked at little cost, and an accepted one costs little: the CPU time of both is bounded."""

import json
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.engines.base import InvalidFieldError, PreparedRequest
from flywheel_server.engines.llama_cpp.completion import Completion
from flywheel_server.engines.llama_cpp.constraints.grammars import grammar_of
from flywheel_server.engines.llama_cpp.constraints.probe import MAX_START_SECONDS, starts_per_step, trial_tokenizer
from flywheel_server.messages import MAX_CONSTRAINT_BYTES, GenerationRequest
from llguidance import LLMatcher

from tests.cpu_time import check_cpu_time
from tests.engines.llama_cpp.test_constraints import of_kind, refusal
from tests.serving import Target

if TYPE_CHECKING:
    from flywheel_server.engines.llama_cpp.llama import Llama


def _deep(levels: int) -> str:
    return '{"items": ' * levels + "{}" + "}" * levels


WORST: dict[str, Callable[[], Any]] = {
    "10,000 levels": lambda: grammar_of(_deep(10_000)[:MAX_CONSTRAINT_BYTES], "", ()),
    "5,000 levels": lambda: grammar_of(_deep(5_000), "", ()),
    "5,000 lists": lambda: grammar_of('{"const": ' + "[" * 5_000 + "]" * 5_000 + "}", "", ()),
    "many schemas": lambda: grammar_of('{"anyOf": [' + ", ".join(['{"type": "string"}'] * 990) + ', {"not": {}}]}', "", ()),
    "many members": lambda: grammar_of(json.dumps({f"a{index}": 1 for index in range(5_000)}), "", ()),
    "ring of references": lambda: grammar_of(
        json.dumps({"$ref": "#/$defs/0", "$defs": {str(n): {"$ref": f"#/$defs/{(n + 1) % 900}"} for n in range(900)}}), "", ()
    ),
    "large pattern": lambda: grammar_of(
        json.dumps({"prefixItems": [{"pattern": f".*[aeiou].{{{n}}}"} for n in range(30, 60)]}), "", ()
    ),
    "many patterns": lambda: grammar_of(
        json.dumps({"prefixItems": [{"pattern": rf"(\p{{L}}|\p{{N}}|{n}){{1,90}}"} for n in range(16)]}), "", ()
    ),
    "long patterns": lambda: grammar_of(
        json.dumps({"prefixItems": [{"pattern": "|".join(f"word{n}" for n in range(390))}] * 2}), "", ()
    ),
    "regex": lambda: grammar_of("", "(" * 30_000 + ")" * 30_000, ()),
    "alternatives": lambda: grammar_of("", "|".join(f"(.*a.{{{n % 9}}})" for n in range(2_000)), ()),
    "classes": lambda: grammar_of("", r"(\p{L}?\p{N}?){1,990}", ()),
}


@pytest.mark.parametrize("name", WORST)
def test_a_constraint_is_refused_at_once(name: str) -> None:
    trial_tokenizer()  # which the engine builds when it loads

    def refuse() -> None:
        with pytest.raises(InvalidFieldError):
            WORST[name]()

    check_cpu_time(0.1, refuse)


def _tuple(length: int, definitions: list[Any]) -> str:
    """Returns a schema of an array with so many items, each of which is one of the definitions."""
    one_of = {"oneOf": [{"$ref": f"#/$defs/{index}"} for index in range(len(definitions))]}
    return json.dumps({"prefixItems": [one_of] * length, "$defs": dict(enumerate(definitions))})


def _chain(length: int, end: object) -> dict[str, Any]:
    return {str(index): {"$ref": f"#/$defs/{index + 1}"} for index in range(length)} | {str(length): end}


ONE_OF: dict[str, tuple[str, bool]] = {
    "many large enums": (_tuple(18, [{"enum": [f"{index} {value}" for value in range(20)]} for index in range(50)]), False),
    "few large enums": (_tuple(4, [{"enum": [f"{index} {value}" for value in range(20)]} for index in range(50)]), True),
    "many enums of a few schemas": (_tuple(80, [{"enum": [f"{index} {n}" for n in range(60)]} for index in range(11)]), True),
    "objects": (_tuple(1, [of_kind({"enum": [f"{index} {n}" for n in range(18)]}) for index in range(50)]), True),
    "objects, often": (_tuple(4, [of_kind({"enum": [f"{index} {n}" for n in range(15)]}) for index in range(50)]), True),
    "objects that only their last property tells apart": (
        _tuple(
            6,
            [
                {
                    "type": "object",
                    "required": list("abcde"),
                    "properties": {name: {"enum": [index if name == "e" else 0]} for name in "abcde"},
                }
                for index in range(40)
            ],
        ),
        True,
    ),
    "too many schemas": (_tuple(1, [{"const": index} for index in range(101)]), False),
    "many schemas": (_tuple(1, [{"const": index} for index in range(100)]), True),
    "long ways to the schemas": (
        json.dumps(
            {"$defs": _chain(600, {"const": 1}), "prefixItems": [{"oneOf": [{"$ref": "#/$defs/0"}, {"const": 2}]}] * 90}
        ),
        True,
    ),
}


@pytest.mark.parametrize("name", ONE_OF)
def test_schemas_of_one_of_are_compared_at_once(name: str) -> None:
    schema, accepted = ONE_OF[name]
    trial_tokenizer()

    def check() -> None:
        if accepted:
            grammar_of(schema, "", ())
        else:
            assert "/oneOf: is too much: a schema may have at most 5000 pairs in oneOf" in refusal(schema)[1]

    check_cpu_time(0.1, check)


LONG: dict[str, dict[str, Any]] = {
    "choice of one letter": {"choices": ("x" * 60_000,)},
    "choice of words": {"choices": ("hello world " * 5_000,)},
    "choices with the same beginning": {"choices": ("a" * 30_000 + "b", "a" * 30_000 + "c")},
    "const": {"json_schema": json.dumps({"const": "hello " * 10_000})},
    "name of a property": {"json_schema": json.dumps({"type": "object", "required": ["long " * 10_000]})},
    "regex": {"regex": "sentence " * 200},
}


@pytest.mark.parametrize("name", LONG)
def test_a_token_of_a_long_forced_text_costs_as_little_as_one_of_a_short_text(name: str) -> None:
    given = {"json_schema": None, "regex": None, "choices": None} | LONG[name]
    grammar = grammar_of(**given)

    def generate() -> None:
        matcher = LLMatcher(trial_tokenizer(), grammar, log_level=0)
        for _ in range(10):
            mask = matcher.compute_bitmask()
            index = next(index for index, bits in enumerate(mask) if bits)
            assert matcher.consume_token(index * 8 + mask[index].bit_length() - 1)

    check_cpu_time(0.02, generate)


CLASSES: dict[str, str] = {
    "without case": "(?i)" + r"[\w\s]" * 700,
    "several without case": "(?i)" + r"[\w\s\p{L}]" * 1_900,
    "in one pair of brackets": "(?i)[" + r"\p{L}" * 1_000 + "]",
    "all characters": "(?i)" + r"[\x{0}-\x{10ffff}]" * 100,
    "all characters, written in another way": "(?i)" + "[ -\U0010ffff]" * 100,
    "any": "(?i)" + r"\p{any}" * 100,
    "all but space": "(?i)" + r"[\S]" * 50,
    "in a group": "(?:a(?s-u:b)(?mi:" + r"[\S]" * 50 + "))",
    "brackets in brackets": "(?i)" + "[[[[[[^a]a]b]c]d]e]" * 50,
    "intersections": "(?i)" + r"[\p{L}&&\w&&[^a]]" * 300,
    "with case": r"[\w\s]" * 900,
    "other than letters": r"[^\p{L}\p{N}]" * 900,
    "alternatives": r"(\w|\s|\p{L}|[^\p{N}a])" * 490,
}
"""Regular expressions with classes of characters that LLGuidance would take from 20 ms to seconds to read."""


@pytest.mark.parametrize("name", CLASSES)
def test_classes_of_characters_that_take_long_to_read_are_refused_at_once(name: str) -> None:
    schemas = (
        {"type": "string", "pattern": CLASSES[name]},
        {"type": "object", "patternProperties": {CLASSES[name]: True}},
    )

    def refuse() -> None:
        assert refusal(regex=CLASSES[name])[1].startswith("has too many classes of characters")
        for schema in schemas:
            assert "classes of characters" in refusal(schema)[1]

    check_cpu_time(0.1, refuse)


def test_classes_of_all_patterns_count_together() -> None:
    schema = {"prefixItems": [{"type": "string", "pattern": "(?i)" + r"[\w]" * 20}] * 4}
    assert "/prefixItems/3/pattern: is too much: a schema may have at most 12000 units" in refusal(schema)[1]


OPTIONAL: dict[str, str] = {
    "characters": "a?" * 1_900,
    "counted": r"\w{0,3}" * 400,
    "counted to": "a{,3}" * 400,
    "repeated": "(a|b|cd)*" * 400,
    "alternatives": r"(\w|)" * 400,
}


@pytest.mark.parametrize("name", OPTIONAL)
def test_many_optional_parts_in_a_row_are_refused_at_once(name: str) -> None:
    check_cpu_time(0.1, lambda: refusal(regex=OPTIONAL[name]))


LATE: dict[str, str] = {
    "after any characters": ".{1500}.*[aeiou].{30}",
    "after letters": "[a-z ]{900}.*[aeiou].{30}",
    "after one character": "a{1500}(.{0,9}[aeiou].{30}|.*[x-z].{40})*",
    "in alternatives": r".{1500}(\w|\w\w|.*[aeiou].{30}){9}",
}


@pytest.mark.parametrize("name", LATE)
def test_a_regex_that_is_costly_only_after_many_characters_is_refused(name: str) -> None:
    assert refusal(regex=LATE[name])[1].startswith("takes too much work")


ORDINARY: dict[str, dict[str, Any]] = {
    "words": {"regex": r"[\w ]{1,200}"},
    "without case": {"regex": r"(?i)(yes|no|maybe), [\w ,.]{1,80}"},
    "anything, without case": {"regex": r"(?i)[\s\S]*done"},
    "Cyrillic without case": {"regex": r"(?i)[жи-я]+( [жи-я]+)*"},
    "Greek without case": {"regex": r"(?i)\p{Greek}{1,20}"},
    "address": {"regex": r"(?i)[a-z0-9._%+-]{1,60}@[a-z0-9.-]{1,60}\.[a-z]{2,8}"},
    "printable": {"regex": r"(?i)[\x20-\x7e]{1,100}"},
    "POSIX": {"regex": "(?i)[[:alpha:]][[:alnum:]_]{0,30}"},
    "1,000 words": {"json_schema": json.dumps({"enum": [f"word{number}" for number in range(1000)]})},
    "1,000 choices": {"choices": [f"choice {number}" for number in range(1000)]},
    "16 patterns": {"json_schema": json.dumps({"prefixItems": [{"type": "string", "pattern": r"^[\w -]{1,99}$"}] * 16})},
    "large words": {"regex": r"\w{1,1990}"},
    "records": {
        "json_schema": json.dumps(
            {
                "type": "array",
                "items": {"type": "object", "properties": {f"name{n}": {"type": "string"} for n in range(190)}},
                "maxItems": 1000,
            }
        )
    },
}


@pytest.mark.parametrize("name", ORDINARY)
def test_an_ordinary_constraint_is_accepted_at_little_cost(name: str) -> None:
    given = {"json_schema": None, "regex": None, "choices": None} | ORDINARY[name]
    trial_tokenizer()
    check_cpu_time(0.1, lambda: grammar_of(**given))
    grammar = grammar_of(**given)
    check_cpu_time(MAX_START_SECONDS, lambda: LLMatcher(trial_tokenizer(), grammar, log_level=0).compute_bitmask())


def test_the_event_loop_does_not_build_a_constraint() -> None:
    grammar = grammar_of(None, "(?i)" + r"[\w]" * 50, None)
    request = GenerationRequest(text="Hello", max_tokens=1, num_samples=8)
    prepared = PreparedRequest(request, [1], 0, grammar)
    llama = cast("Llama", None)
    begin = partial(Completion, llama, prepared, range(8), seed=0, emit=lambda _: None, cache=True)
    check_cpu_time(0.003, begin)


async def test_samples_whose_constraint_takes_long_to_build_are_generated(embedded_target: Target) -> None:
    regex = "(?i)" + r"[\w]" * 50 + "|yes|no"
    request = pb.GenerationRequest(text="Is the sea blue?", max_tokens=2, num_samples=8, regex=regex, top_k=1)
    assert len((await embedded_target.stub.GenerateAll(request)).responses) == 8


def test_samples_whose_constraint_takes_long_to_build_start_in_several_steps() -> None:
    cheap, costly = (grammar_of(None, regex, None) for regex in ("yes|no", "(?i)" + r"[\w]" * 50))
    assert starts_per_step(cheap) > 2 * starts_per_step(costly) >= 2
