"""Tells whether two rewritten schemas can allow the same value. LLGuidance enforces `oneOf` only if they cannot."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from flywheel_server.engines.llama_cpp.constraints.json_values import type_of
from flywheel_server.engines.llama_cpp.constraints.keywords import TYPES

Schema = dict[str, Any] | bool


@dataclass(frozen=True, slots=True)
class Outline:
    """What tells apart the values that a schema allows.

    Attributes:
        types: The types of the values; "number" stands for "integer" too.
        values: The values, if the schema lists them.
        properties: The values of each property that is required and has a list of values.
    """

    types: frozenset[str]
    values: frozenset[str] | None
    properties: dict[str, frozenset[str]]

    def is_disjoint(self, other: "Outline") -> bool:
        """Returns whether it is clear that no value is allowed by both schemas.

        It is clear if they have no type and no listed value in common, or both require a property for which it is clear.
        """
        if self.types.isdisjoint(other.types):
            return True
        if self.values is not None and other.values is not None:
            return self.values.isdisjoint(other.values)
        return any(
            self.properties[name].isdisjoint(other.properties[name]) for name in self.properties.keys() & other.properties
        )


class Outlines:
    """The outlines of rewritten schemas. Each is worked out once, because many `oneOf` may refer to the same schema."""

    def __init__(self, definitions: dict[str, Schema]) -> None:
        self._definitions = definitions
        self._outlines: dict[int, Outline] = {}  # by the identity of the schema

    def of(self, schema: Schema) -> Outline:
        """Returns the outline of a schema. A `$ref` in it must not lead back to itself."""
        passed = []
        while id(schema) not in self._outlines:
            passed.append(schema)
            target = self._target(schema)
            if target is None:
                self._outlines[id(schema)] = _outline(schema)
                break
            schema = target
        outline = self._outlines[id(schema)]
        self._outlines |= dict.fromkeys(map(id, passed), outline)
        return outline

    def _target(self, schema: Schema) -> Schema | None:
        """Returns the schema that this one stands for, if it only stands for another one."""
        if isinstance(schema, dict) and "$ref" in schema:
            return self._definitions[schema["$ref"].removeprefix("#/$defs/")]
        if isinstance(schema, dict) and "allOf" in schema:
            target: Schema = schema["allOf"][0]
            return target
        return None


def _outline(schema: Schema) -> Outline:
    if isinstance(schema, bool):
        return Outline(_types(TYPES if schema else ()), None, {})
    if "enum" in schema:
        return Outline(_types(map(type_of, schema["enum"])), _keys(schema["enum"]), {})
    if "anyOf" in schema or "oneOf" in schema:
        return Outline(_types(TYPES), None, {})
    given = schema.get("type", TYPES)
    types = _types([given] if isinstance(given, str) else given)
    if types != {"object"}:
        return Outline(types, None, {})
    properties = {
        name: schema["properties"][name] for name in schema.get("required", ()) if name in schema.get("properties", {})
    }
    listed = {name: each["enum"] for name, each in properties.items() if isinstance(each, dict) and "enum" in each}
    return Outline(types, None, {name: _keys(values) for name, values in listed.items()})


def _types(names: Iterable[str]) -> frozenset[str]:
    return frozenset("number" if name == "integer" else name for name in names)


def _keys(values: Iterable[Any]) -> frozenset[str]:
    """Returns a text for each value, which is the same for equal values."""
    return frozenset(json.dumps(value, sort_keys=True) for value in values)
