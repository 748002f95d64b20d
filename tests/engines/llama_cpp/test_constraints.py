"""Constraints are turned into grammars that allow just what they say, or are refused with the place of what is wrong."""

import json
import re
from itertools import product
from pathlib import Path
from typing import Any

import llguidance
import pytest
import xllamacpp
from flywheel_server.engines.base import InvalidFieldError
from flywheel_server.engines.llama_cpp.constraints.grammars import grammar_of
from flywheel_server.engines.llama_cpp.constraints.guard import ConstraintGuard
from flywheel_server.engines.llama_cpp.constraints.keywords import SUPPORTED_KEYWORDS
from flywheel_server.messages import MAX_VIOLATIONS

from tests.cpu_time import check_cpu_time


def allows(grammar: str | None, text: str) -> bool:
    assert grammar
    guard = ConstraintGuard(grammar)
    return guard.accepts(text) and guard.is_complete()


def schema_allows(schema: object, text: str) -> bool:
    return allows(grammar_of(json.dumps(schema), "", ()), text)


def refusal(json_schema: object = "", regex: str = "", choices: tuple[str, ...] = ()) -> tuple[str, str]:
    """Returns the field and the description with which a constraint is refused."""
    text = json_schema if isinstance(json_schema, str) else json.dumps(json_schema)
    with pytest.raises(InvalidFieldError) as caught:
        grammar_of(text, regex, choices)
    return caught.value.field, caught.value.description


def test_without_a_constraint_there_is_no_grammar() -> None:
    assert grammar_of(None, None, None) == ""


STARTS = ("", "^", r"\A", "(?:^)")
ENDS = ("", "$", r"\z", "(?:$)")
TEXTS = ("", "a", "b", "ab", "ba", "aa", "a\n", "\na", "^a", "a$")


@pytest.mark.parametrize("regex", ["", "a", "a|b", "a?", "(a|b)+", "[^$]"])
def test_anchors_at_both_ends_change_nothing(regex: str) -> None:
    bare = grammar_of(None, f"(?:{regex})", None)
    allowed = [text for text in TEXTS if allows(bare, text)]
    assert allowed == [text for text in TEXTS if re.fullmatch(regex, text)]
    for start, end in product(STARTS, ENDS):
        anchored = grammar_of(None, f"{start}(?:{regex}){end}", None)
        assert [text for text in TEXTS if allows(anchored, text)] == allowed, (start, end)


@pytest.mark.parametrize("anchor", ["^", "$", r"\A", r"\z", "(?m:^)", "(?m:$)", r"\b", r"\B"])
def test_anchors_elsewhere_are_refused(anchor: str) -> None:
    for regex in (f"a{anchor}b", f"(a{anchor}b|c)", f"a({anchor}b)?"):
        assert refusal(regex=regex)[0] == "regex"


@pytest.mark.parametrize("draft", ["draft/2020-12", "draft/2019-09", "draft-07", "draft-06"])
def test_the_keywords_are_those_of_the_newest_draft_whatever_the_schema_names(draft: str) -> None:
    dialect = {"$schema": f"http://json-schema.org/{draft}/schema#"}
    pair = {"type": "array", "prefixItems": [{"const": 1}, {"const": 2}], "items": False, "minItems": 2}
    assert schema_allows({**dialect, **pair}, "[1, 2]")
    assert not schema_allows({**dialect, **pair}, "[2, 1]")
    assert refusal({**dialect, "items": [{"const": 1}]}) == ("json_schema", "/items: is not a schema")


@pytest.mark.parametrize(
    "schema",
    [
        {f"x{number}": True for number in range(500)},
        {"properties": {f"p{number}": {"not": {}} for number in range(150)}},
        {"prefixItems": [{"pattern": 1}] * 16, "items": {"properties": {f"p{number}": 1 for number in range(150)}}},
        {"anyOf": [{"type": "x", "if": {}, "then": {}}] * 100},
    ],
)
def test_many_problems_of_a_schema_are_named_and_not_too_many(schema: dict[str, Any]) -> None:
    def refuse() -> None:
        with pytest.raises(InvalidFieldError) as caught:
            grammar_of(json.dumps(schema), None, None)
        assert len({each.description for each in caught.value.violations}) == MAX_VIOLATIONS

    check_cpu_time(0.1, refuse)


def test_nothing_more_is_read_of_a_schema_that_has_too_much() -> None:
    schema = {"properties": {"a": {"not": {}}, "b": {"enum": [*range(1001)]}, "c": {"not": {}}}}
    with pytest.raises(InvalidFieldError) as caught:
        grammar_of(json.dumps(schema), None, None)
    assert [each.description.partition(":")[0] for each in caught.value.violations] == [
        "/properties/a/not",
        "/properties/b/enum",
    ]


PERSON: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "Person",
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "description": "Full name"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "pets": {"type": "array", "items": {"$ref": "#/$defs/Pet"}, "maxItems": 2},
    },
    "required": ["name"],
    "$defs": {"Pet": {"enum": ["cat", "dog"]}},
}


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ('{"name": "Ada", "age": 36, "pets": ["cat", "dog"]}', True),
        ('{"name": "Ada"}', True),
        ('{"name": "Ada", "pets": []}', True),
        ('{"name":"Ada"}', False),  # other whitespace
        ('{"name": "Ada",\n"age": 36}', False),
        ('{ "name": "Ada"}', False),
        ('{"age": 36}', False),
        ('{"name": ""}', False),
        ('{"name": "Ada", "age": 151}', False),
        ('{"name": "Ada", "age": 3.5}', False),
        ('{"name": "Ada", "pets": ["cat", "dog", "cat"]}', False),
        ('{"name": "Ada", "pets": ["cow"]}', False),
        ('{"name": "Ada", "size": 3}', False),
        ('{"name": "Ada"} ', False),
        ('{"name": "Ada"', False),
    ],
)
def test_a_document_is_as_the_schema_says(text: str, allowed: bool) -> None:
    assert schema_allows(PERSON, text) is allowed


def of_kind(schema: object) -> object:
    return {"type": "object", "properties": {"kind": schema}, "required": ["kind"]}


def test_a_named_property_cannot_be_named_again_in_another_spelling() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "string"}}
    assert schema_allows(schema, '{"a": 1, "b": "x", "c": "y"}')
    assert schema_allows(schema, '{"b": "x"}')
    assert not schema_allows(schema, '{"a": "x"}')
    assert not schema_allows(schema, '{"\\u0061": "x"}')
    assert not schema_allows(schema, '{"a": 1, "a": "x"}')


@pytest.mark.parametrize(
    ("schema", "description"),
    [
        ("{", "is not JSON: "),
        ("[]", "is not a JSON object"),
        ('{"type": "string", "type": "null"}', "is not JSON: a name is twice in one object"),
        ('{"minimum": NaN}', "is not JSON: NaN"),
        (f'{{"minimum": {"9" * 5000}}}', "has a number that is too long"),
        ('{"minimum": 1e999}', "/minimum: is not between"),
        *(
            ({name: 10**400}, f"/{name}: ")
            for name in ("minimum", "exclusiveMaximum", "multipleOf", "const", "minLength", "maxItems", "minProperties")
        ),
        ({"enum": [1, 10**400]}, "/enum: is not between"),
        ({"const": {"a": [-(10**400)]}}, "/const: is not between"),
        ({"x-guidance": {"lenient": True}}, "/x-guidance: is not a supported keyword"),
        ({"properties": {"a": {"x-guidance": {}}}}, "/properties/a/x-guidance: is not a supported keyword"),
        ({"$schema": "http://json-schema.org/draft-04/schema#"}, "/$schema: is no draft"),
        ({"properties": {"a": {"$id": "b"}}}, "/properties/a/$id: is only supported at the top"),
        ({"properties": {"a/b~c": {"not": {}}}}, "/properties/a~1b~0c/not: is not a supported keyword"),
        ({"properties": {"a": {"pattern": "("}}}, "/properties/a: "),
        ({"properties": {"a": {"pattern": "a{3000}"}}}, "/properties/a/pattern: has more than 2000 characters"),
        ({"properties": {"a": {"pattern": ".*[aeiou].{30}"}}}, "/properties/a/pattern: takes too much work"),
        ({"properties": {"a": 3}}, "/properties/a: is not a schema"),
        ({"properties": {"a\n": {}}}, "/properties: has a name with a control character"),
        ({"properties": []}, "/properties: is not an object"),
        ({"items": [{}]}, "/items: is not a schema"),
        ({"prefixItems": {}}, "/prefixItems: is not a list of schemas"),
        ({"type": "text"}, "/type: is not a type"),
        ({"type": []}, "/type: is not a type"),
        ({"type": [["string"]]}, "/type: is not a type"),
        ({"enum": []}, "/enum: is not a list of values"),
        ({"enum": ["a"], "type": "integer"}, ": has no value of the type"),
        ({"enum": ["a"], "minLength": 1}, "/minLength: is not supported beside enum"),
        ({"const": 2**60}, "/const: is not between"),
        ({"anyOf": []}, "/anyOf: is not a list of schemas"),
        ({"anyOf": [{}], "type": "string"}, "/type: is not supported beside anyOf"),
        ({"allOf": [{}, {}]}, "/allOf: has more than one schema"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "/oneOf: has schemas that may allow the same value"),
        (
            {"anyOf": [{"pattern": "a"}, {"anyOf": [{"pattern": "b"}]}]},
            "has more than 1 schemas for one value that have pattern",
        ),
        ({"$ref": "https://example.com/schema.json"}, "/$ref: is not `#` or `#/…`"),
        ({"$ref": "other.json#/a"}, "/$ref: is not `#` or `#/…`"),
        ({"$ref": "#/$defs/a"}, "/$ref: points to no schema"),
        ({"$ref": "#"}, "refers to itself"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {}]}}}, "refers to itself"),
        ({"minimum": "1"}, "/minimum: is not a number"),
        ({"minimum": 2**60}, "/minimum: is not between"),
        ({"minimum": 1e-20}, "/minimum: has more than 15 digits"),
        ({"type": "integer", "exclusiveMinimum": 1, "exclusiveMaximum": 2}, "has bounds between which no number"),
        ({"type": "number", "minimum": 1, "maximum": 2, "multipleOf": 3}, "has bounds between which no number"),
        (
            {"anyOf": [{"multipleOf": 2}, {"$ref": "#/$defs/a"}], "$defs": {"a": {"multipleOf": 3}}},
            "have multipleOf",
        ),
        ({"const": [list(range(201))]}, "/const: is too much: a schema may have at most 200 inner values"),
        ({"multipleOf": 0}, "/multipleOf: is not above 0"),
        ({"multipleOf": 1_000_003}, "/multipleOf: is too much: a schema may have at most 1000 multiples"),
        ({"minItems": -1}, "/minItems: is not a whole number"),
        ({"maxItems": 100_000}, "/maxItems: is more than 1000"),
        ({"items": {"maxItems": 600}, "maxItems": 600}, "is too much: a schema may have at most 1000 items"),
        ({"maxLength": 100_000}, "/maxLength: is more than 10000"),
        ({"minLength": 3, "maxLength": 2}, "/maxLength: is less than minLength"),
        ({"required": ["a"], "minProperties": 3}, "/minProperties: is more than one above"),
        ({"required": ["a"], "additionalProperties": False}, "/required: names a property that additionalProperties excludes"),
        ({"required": "a"}, "/required: is not a list of names"),
        ({"properties": {"a": {}}, "patternProperties": {"b": {}}}, "/patternProperties: is not supported beside properties"),
        ({"patternProperties": {"b": {}}, "additionalProperties": {}}, "/additionalProperties: is not supported beside"),
        ({"patternProperties": {"a": {}, "aa": {}}}, "are not disjoint"),
        ({"format": "uri"}, "/format: is not a supported format"),
        ({"format": "date", "pattern": "1"}, "/format: is not supported beside pattern"),
        ({"pattern": "[a&&b]", "type": "string"}, "allows no value"),
        ({"type": "string", "pattern": "^a$", "minLength": 5}, "allows no value"),
        ({"type": "string", "format": "date", "maxLength": 3}, "allows no value"),
        (
            {"type": "array", "items": {"type": "string", "pattern": "^a$", "maxLength": 0}, "minItems": 2},
            "/items: allows no value",
        ),
        (
            {"properties": {"a": {"type": "string", "pattern": r"^\P{any}$"}}, "required": ["a"], "type": "object"},
            "/properties/a: ",
        ),
        ({"type": "array", "items": False, "minItems": 1}, "allows no value: required item is unsatisfiable"),
        ({"type": "object", "patternProperties": {"[a&&b]": {}}, "minProperties": 1}, "allows no text, or a beginning after"),
        ({"enum": ["\ud800"]}, "unexpected end of hex escape"),
        ({"properties": {f"p{index}": {} for index in range(201)}}, "/properties: is too much"),
        ({"enum": list(range(1001))}, "/enum: is too much"),
        ({"anyOf": [{}] * 1000}, "/anyOf/999: is too much"),
        ({"type": "object", "properties": {"a": {}}, "maxProperties": 2}, "min/maxProperties only supported"),
    ],
)
def test_what_is_not_enforced_is_refused_with_its_place(schema: object, description: str) -> None:
    field, given = refusal(schema)
    assert field == "json_schema"
    assert description in given
    assert "Regex" not in given
    assert "\n" not in given


@pytest.mark.parametrize(
    ("schemas", "accepted"),
    [
        ([{"type": "string"}, {"type": ["integer", "null"]}], True),
        ([{"type": "integer"}, {"type": "number"}], False),
        ([{"const": 1}, {"const": 1.0}], False),
        ([{"const": [1]}, {"const": [2]}], True),
        ([{"const": [1]}, {"const": [1.0]}], False),
        ([of_kind(True), of_kind({"const": 1})], False),
        ([of_kind({"const": 2}), of_kind({"enum": [1, 3]})], True),
        ([{"const": "a"}, {"enum": ["b", 1]}, {"type": "object"}], True),
        ([{"const": "a"}, {"enum": ["b", "a"]}], False),
        ([{"type": "object"}, {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}], False),
        ([{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}], True),
        ([{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/cat"}], False),
        ([{"anyOf": [{"type": "string"}]}, {"type": "integer"}], False),
        ([True, {"type": "string"}], False),
    ],
)
def test_one_of_is_accepted_if_its_schemas_exclude_one_another(schemas: list[Any], accepted: bool) -> None:
    schema = {"oneOf": schemas, "$defs": {kind: of_kind({"const": kind}) for kind in ("cat", "dog")}}
    if accepted:
        assert grammar_of(json.dumps(schema), "", ())
    else:
        assert "may allow the same value" in refusal(schema)[1]


def test_annotations_are_accepted_and_draft_07_too() -> None:
    schema = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "$id": "https://example.com/a",
        "definitions": {"a": {"type": "integer", "default": "x", "examples": [{"x-guidance": 1}]}},
        "$ref": "#/definitions/a",
        "description": "d",
    }
    assert schema_allows(schema, "12")
    assert not schema_allows(schema, '"x"')


@pytest.mark.parametrize(
    "regex", ["yes|no", "a/b", r"a\/b", "a\nb", "a\\\nb", r"\\", "é+", r"[/\n]+", r"[^a-z]{1,3}", r"\d{3}-\d{4}"]
)
def test_a_regex_matches_the_whole_text(regex: str) -> None:
    grammar = grammar_of("", regex, ())
    for text in ("yes", "no", "a/b", "a\nb", "\\", "ééé", "/\n/", "123-4567"):
        assert allows(grammar, text) is bool(re.fullmatch(regex, text))


@pytest.mark.parametrize(
    ("regex", "description"),
    [
        ("(", "unclosed group"),
        (r"(?=a)a", "look-around, including look-ahead and look-behind, is not supported"),
        (r"(a)\1", "backreferences are not supported"),
        (r"\bab", "lookarounds not supported yet; WordUnicode in regex"),
        ("(?x)#[\n(a{1000}){1000}", "has the flag x, which is not supported"),
        ("a{2001}", "has more than 2000 characters"),
        ("((a{100}){100}){100}", "has more than 2000 characters"),
        ("(a{0,100}b{3,}){99}", "has more than 2000 characters"),
        ("a{99999999999999999999}", "has more than 2000 characters"),
        (".*[aeiou].{30}", "takes too much work"),
        (".*[aeiou].{500}", "takes too much work"),
        ("[a&&b]", "allows no text"),
        ("a[b&&c]", "allows no text"),
        (r"\P{any}", "allows no text"),
        (r"[^\x{0}-\x{10ffff}]|x+[a--a]y", "allows no text"),
    ],
)
def test_a_regex_that_cannot_be_enforced_is_refused(regex: str, description: str) -> None:
    field, given = refusal(regex=regex)
    assert field == "regex"
    assert given.startswith(description)


def test_a_part_of_a_regex_may_match_nothing() -> None:
    assert allows(grammar_of("", "x(y[a&&b])*z|[a&&b]", ()), "xz")


def test_choices_are_the_texts_as_they_are() -> None:
    texts = ("yes", "no", "nothing", 'a "quoted"\n\\text', "<|im_end|>", "😀é", "/x/")
    grammar = grammar_of("", "", texts)
    assert [text for text in (*texts, "noth", "", "yesno", "maybe", "YES") if allows(grammar, text)] == list(texts)


@pytest.mark.parametrize(
    ("choices", "field", "description"),
    [
        (("\ud800",), "choices", ""),
    ],
)
def test_choices_that_cannot_be_enforced_are_refused(choices: tuple[str, ...], field: str, description: str) -> None:
    assert refusal(choices=choices)[0] == field
    assert refusal(choices=choices)[1].startswith(description)


def test_every_supported_keyword_is_read() -> None:
    for keyword in SUPPORTED_KEYWORDS:
        assert "not a supported keyword" not in refusal({keyword: {"not": {}}} | {"else": 1})[1].partition("/else")[0]


def test_constraints_are_checked_by_what_enforces_them() -> None:
    """The llguidance package and llama.cpp have the same version of the crate on which LLGuidance is built."""
    versions = [
        set(re.findall(rb"derivre-\d+\.\d+\.\d+", library.read_bytes()))
        for module in (llguidance, xllamacpp)
        for library in Path(module.__path__[0]).glob("*.so")
    ]
    assert versions[0] == versions[1]
    assert len(versions[0]) == 1
