"""Tells whether two rewritten schemas can allow the same value. LLGuidance enforces `oneOf` only if they cannot."""

import json
from typing import Any

from flywheel_server.engines.llama_cpp.constraints.json_values import has_type
from flywheel_server.engines.llama_cpp.constraints.keywords import TYPES

Schema = dict[str, Any] | bool


def are_disjoint(first: Schema, second: Schema, definitions: dict[str, Schema]) -> bool:
    """Returns whether it is clear that no value is allowed by both schemas.

    It is clear if they have no type and no listed value in common, or both require a property for which it is clear.
    """
    one, other = _target(first, definitions), _target(second, definitions)
    if isinstance(one, bool) or isinstance(other, bool):
        return one is False or other is False
    if not _types(one) & _types(other):
        return True
    if "enum" in one and "enum" in other:
        return not {_key(value) for value in one["enum"]} & {_key(value) for value in other["enum"]}
    if _types(one) == _types(other) == {"object"}:
        required = set(one.get("required", ())).intersection(other.get("required", ()))
        return any(
            _values(one, name).isdisjoint(_values(other, name))
            for name in required
            if _values(one, name) and _values(other, name)
        )
    return False


def _values(schema: dict[str, Any], name: str) -> set[str]:
    """Returns the values that are listed for a property; an empty set if none are."""
    property_schema = schema.get("properties", {}).get(name)
    return set(map(_key, property_schema.get("enum", ()))) if isinstance(property_schema, dict) else set()


def _target(schema: Schema, definitions: dict[str, Schema]) -> Schema:
    while isinstance(schema, dict):
        if "$ref" in schema:
            schema = definitions[schema["$ref"].removeprefix("#/$defs/")]
        elif "allOf" in schema:
            schema = schema["allOf"][0]
        else:
            break
    return schema


def _types(schema: dict[str, Any]) -> set[str]:
    """Returns the types that the schema allows; "number" stands for "integer" too."""
    if "enum" in schema:
        types = {name for name in TYPES for value in schema["enum"] if has_type(value, name)}
    elif "anyOf" in schema or "oneOf" in schema:
        types = set(TYPES)
    else:
        given = schema.get("type", TYPES)
        types = {given} if isinstance(given, str) else set(given)
    return {"number" if name == "integer" else name for name in types}


def _key(value: Any) -> str:  # noqa: ANN401 - JSON
    """Returns a text that is equal for equal values."""
    return json.dumps(value, sort_keys=True)
