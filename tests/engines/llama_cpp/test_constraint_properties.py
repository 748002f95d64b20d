"""Whatever the constraint, it is turned into a grammar or refused, soon, and means what it says."""

import json
import random
import re
import string
from typing import Any

import jsonschema
from flywheel_server.engines.base import InvalidFieldError
from flywheel_server.engines.llama_cpp.constraints.grammars import grammar_of
from flywheel_server.engines.llama_cpp.constraints.guard import ConstraintGuard, _bytes_tokenizer
from flywheel_server.engines.llama_cpp.constraints.keywords import ANNOTATIONS, FORMATS, SUPPORTED_KEYWORDS, TYPES
from flywheel_server.engines.llama_cpp.constraints.probe import TOKENS, _Tokens, trial_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher

from tests.cpu_time import check_cpu_time

TEXTS = _Tokens().tokens

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
COUNTS = st.integers(-1, 12) | st.sampled_from([1.0, 1000, 10_000, 10**9])
NUMBERS = st.integers(-50, 50) | st.floats(-50, 50).map(lambda value: round(value, 3)) | st.sampled_from([2**53, 1e-9, 2**60])
PATTERNS = st.sampled_from(["^a+$", "b", "[^x]{2,4}", ".*a.{9}", "^(a|b){1,60}$", "(", r"\d\w\s", "é/", "^$", "a$|^b"])
NAMES = st.sampled_from(["a", "b", "c/d", "~", '"', "\\", "é", "a b", ""])


def _schemas(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    keywords: dict[str, st.SearchStrategy[Any]] = {
        "type": st.sampled_from(TYPES) | st.lists(st.sampled_from(TYPES), max_size=3),
        "enum": st.lists(VALUES, max_size=3),
        "const": VALUES,
        "properties": st.dictionaries(NAMES, inner, max_size=3),
        "patternProperties": st.dictionaries(PATTERNS, inner, max_size=2),
        "required": st.lists(NAMES, max_size=2),
        "$ref": st.sampled_from(["#", "#/properties/a", "#/$defs/a", "#/items", "#/anyOf/0", "#/properties/c~1d", "b"]),
        "$defs": st.dictionaries(NAMES, inner, max_size=2),
        "pattern": PATTERNS,
        "format": st.sampled_from([*FORMATS, "uri"]),
        **dict.fromkeys(("anyOf", "oneOf", "allOf", "prefixItems"), st.lists(inner, max_size=3)),
        **dict.fromkeys(("additionalProperties", "items"), inner),
        **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"), COUNTS),
        **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"), NUMBERS),
    }
    groups = [
        *([name] for name in ("enum", "const", "anyOf", "oneOf", "allOf", "$ref")),
        ["type", "enum"],
        ["type", "properties", "required", "additionalProperties", "minProperties", "maxProperties"],
        ["type", "patternProperties", "required"],
        ["type", "prefixItems", "items", "minItems", "maxItems"],
        ["type", "minLength", "maxLength", "pattern", "format"],
        ["type", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"],
        ["$defs", "$ref"],
        list(keywords),
    ]
    return st.sampled_from(groups).flatmap(
        lambda names: st.fixed_dictionaries({}, optional={name: keywords[name] for name in names})
    )


SCHEMAS = st.recursive(st.booleans() | _schemas(st.booleans()), _schemas, max_leaves=6)


def _grammar(json_schema: str = "", regex: str = "", choices: tuple[str, ...] = ()) -> str | None:
    trial_tokenizer()
    grammar: str | None = None
    description = "it was refused"

    def read() -> None:
        nonlocal grammar, description
        try:
            grammar = grammar_of(json_schema, regex, choices)
        except InvalidFieldError as error:
            description = error.description

    check_cpu_time(0.1, read)
    assert description
    assert "\n" not in description
    return grammar


def _random_text(grammar: str, chance: random.Random) -> str | None:
    """Returns a text that the grammar allows, or None if none was found in some tokens."""
    matcher = LLMatcher(trial_tokenizer(), grammar, log_level=0)
    text = b""
    for _ in range(60):
        mask = matcher.compute_bitmask()
        assert not matcher.is_error()
        if matcher.is_accepting() and chance.random() < 0.5:
            return text.decode(errors="ignore")
        allowed = [index * 8 + bit for index, bits in enumerate(mask) if bits for bit in range(8) if bits >> bit & 1]
        # A short token often closes something.
        token = min(chance.choices(allowed, k=3)) if allowed else TOKENS
        if token == TOKENS:
            return text.decode(errors="ignore")
        text += TEXTS[token]
        matcher.consume_token(token)
    return None


def _allows(grammar: str, text: str) -> bool:
    guard = ConstraintGuard(grammar)
    return guard.accepts(text) and guard.is_complete()


@settings(max_examples=50, deadline=None)
@given(SCHEMAS, st.randoms(use_true_random=False))
def test_no_document_that_breaks_an_accepted_schema_is_allowed(schema: Any, chance: random.Random) -> None:
    if grammar := _grammar(json.dumps(schema)):
        validator = jsonschema.Draft202012Validator(schema)
        for text in (_random_text(grammar, chance) for _ in range(3)):
            assert text is None or validator.is_valid(json.loads(text))


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=200) | st.binary(max_size=50).map(lambda data: data.decode("latin-1")), VALUES)
def test_no_text_and_no_value_makes_it_fail_otherwise(text: str, value: Any) -> None:
    _grammar(text)
    _grammar(json.dumps(value))
    _grammar(json.dumps({"properties": {"a": value}}))
    _grammar(json.dumps(dict.fromkeys(SUPPORTED_KEYWORDS.keys() | ANNOTATIONS, value)))


REGEXES = st.text(string.ascii_letters[:3] + "é/\n\r\t\\\"'.*+?|()[]{}^$0123,:-&~dwsxDpuib ", min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(REGEXES, st.lists(st.text('abcé/\n\r\t\\" 01dx', max_size=4), min_size=1, max_size=5))
def test_a_regex_means_what_llguidance_says_it_means(regex: str, texts: list[str]) -> None:
    own = _grammar(regex=regex)
    if own is None:
        return
    theirs = LLMatcher(_bytes_tokenizer(), LLMatcher.grammar_from_regex(regex), log_level=0)
    assert not theirs.is_error()
    for text in texts:
        data = list(text.encode())
        matcher = theirs.deep_copy()
        expected = matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting()
        assert _allows(own, text) is expected


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=12), min_size=1, max_size=6), st.text(max_size=3))
def test_choices_are_allowed_and_nothing_else(choices: list[str], other: str) -> None:
    grammar = _grammar(choices=tuple(choices))
    assert grammar
    assert all(_allows(grammar, text) for text in choices)
    assert re.fullmatch("|".join(map(re.escape, choices)), other) or not other.isascii() or not _allows(grammar, other)
