"""Checks a JSON Schema, and rewrites it so that LLGuidance enforces all of it.

A schema that passes has only the keywords of `SUPPORTED_KEYWORDS`, and its counts are bounded. The rewritten schema has no
annotations, and each `$ref` in it points into `$defs`.
"""

from collections import Counter
from graphlib import CycleError, TopologicalSorter
from itertools import combinations
from math import comb
from typing import Any
from urllib.parse import unquote

from flywheel_server.engines.llama_cpp.constraints.constraint_problem import ConstraintProblemError, ConstraintTooLargeError
from flywheel_server.engines.llama_cpp.constraints.disjoint import Outlines, Schema
from flywheel_server.engines.llama_cpp.constraints.json_values import child, has_type, is_count
from flywheel_server.engines.llama_cpp.constraints.keywords import (
    ANNOTATIONS,
    DIALECTS,
    FORMATS,
    IN_PLACE,
    SUPPORTED_KEYWORDS,
    TYPES,
)
from flywheel_server.engines.llama_cpp.constraints.numbers import BOUNDS, check_multiple, check_number, check_range, is_number
from flywheel_server.engines.llama_cpp.constraints.regexes import check_size
from flywheel_server.engines.llama_cpp.constraints.schema_limits import MAX_ALTERNATIVES, MAX_COUNTS, MAX_LENGTH
from flywheel_server.messages import MAX_VIOLATIONS


class SchemaReader:
    """Reads one schema.

    Attributes:
        schemas: Each schema that has been read and rewritten, by its JSON pointer. A schema comes after the schemas within it.
        definitions: The rewritten schemas to which a `$ref` points, by their names in the rewritten `$defs`.
        texts: The rewritten schemas of texts that have a pattern, or a length and a format, by the pointers of these keywords.
    """

    def __init__(self) -> None:
        self.schemas: dict[str, Schema] = {}
        self.definitions: dict[str, Schema] = {}
        self.texts: dict[str, dict[str, Any]] = {}
        self._counts: Counter[str] = Counter()
        self._refs: list[tuple[dict[str, Any], str, str]] = []  # each rewritten schema with its pointer and its target's
        self._in_place: dict[str, list[str]] = {}
        self._problems: list[ConstraintProblemError] = []

    def read(self, document: dict[str, Any]) -> Schema:
        """Returns the rewritten schema, without `$defs`. Raises `ConstraintProblemError` with all problems of the schema."""
        dialect = document.get("$schema", "https://json-schema.org/draft/2020-12/schema")
        if not isinstance(dialect, str) or dialect.partition("://")[2].rstrip("#") not in DIALECTS:
            raise ConstraintProblemError("is no draft of JSON Schema that is supported", "/$schema")
        try:
            root = self._schema({name: value for name, value in document.items() if name not in ("$schema", "$id")}, "")
            if not self._problems:
                self._resolve_refs()
                return root
        except ConstraintProblemError as error:
            self._problems.append(error)
        first, *first.further = self._problems
        raise first from None

    def _note(self, problem: ConstraintProblemError) -> None:
        """Keeps the problem, to raise it when the rest of the schema has been read; raises it if there are enough of them."""
        if isinstance(problem, ConstraintTooLargeError) or len(self._problems) == MAX_VIOLATIONS - 1:
            raise problem
        self._problems.append(problem)

    def _resolve_refs(self) -> None:
        names: dict[str, str] = {}
        for schema, pointer, target in self._refs:
            if target not in self.schemas:
                raise ConstraintProblemError("points to no schema", f"{pointer}/$ref")
            name = names.setdefault(target, str(len(names)))
            schema["$ref"] = f"#/$defs/{name}"
            self._in_place.setdefault(pointer, []).append(target)
        self.definitions = {name: self.schemas[target] for target, name in names.items()}
        self._check_alternatives()
        self._replace_one_of()

    def _replace_one_of(self) -> None:
        """Replaces each `oneOf` with `anyOf`, which is the same if its schemas exclude one another."""
        outlines = Outlines(self.definitions)
        for pointer, read in self.schemas.items():
            if isinstance(read, dict) and "oneOf" in read:
                place = child(pointer, "oneOf")
                schemas = read.pop("oneOf")
                self._count("pairs in oneOf", comb(len(schemas), 2), place)
                if not all(one.is_disjoint(other) for one, other in combinations(map(outlines.of, schemas), 2)):
                    raise ConstraintProblemError(
                        "has schemas that may allow the same value: give them different types, or a required property with "
                        "other values",
                        place,
                    )
                read["anyOf"] = schemas

    def _check_alternatives(self) -> None:
        """Checks the schemas that apply to one value: a schema, and all schemas of its `anyOf`, `oneOf`, `allOf` and `$ref`."""
        try:
            order = tuple(TopologicalSorter(self._in_place).static_order())
        except CycleError as error:
            problem = "refers to itself without an item or a property in between"
            raise ConstraintProblemError(problem, error.args[1][0]) from None
        for keywords, limit in MAX_ALTERNATIVES.items():
            found: Counter[str] = Counter()
            for pointer in order:
                schema = self.schemas[pointer]
                found[pointer] = isinstance(schema, dict) and any(keyword in schema for keyword in keywords)
                found[pointer] += sum(found[each] for each in self._in_place.get(pointer, ()))
                if found[pointer] > limit:
                    problem = f"has more than {limit} schemas for one value that have {' or '.join(keywords)}"
                    raise ConstraintProblemError(problem, pointer)

    def _count(self, kind: str, added: int, pointer: str) -> None:
        self._counts[kind] += added
        if self._counts[kind] > MAX_COUNTS[kind]:
            raise ConstraintTooLargeError(f"is too much: a schema may have at most {MAX_COUNTS[kind]} {kind}", pointer)

    def _schema(self, value: Any, pointer: str) -> Schema:  # noqa: ANN401 - JSON
        self._count("schemas", 1, pointer)
        rewritten: Schema
        if isinstance(value, bool):
            rewritten = value
        elif isinstance(value, dict):
            try:
                rewritten = self._rewritten(value, pointer)
            except ConstraintProblemError as error:
                self._note(error)
                rewritten = True
        else:
            self._note(ConstraintProblemError("is not a schema", pointer))
            rewritten = True
        self.schemas[pointer] = rewritten
        return rewritten

    def _rewritten(self, schema: dict[str, Any], pointer: str) -> dict[str, Any]:
        for name in schema:
            if name in ("$schema", "$id"):
                self._note(ConstraintProblemError("is only supported at the top of the schema", child(pointer, name)))
            elif name not in ANNOTATIONS and name not in SUPPORTED_KEYWORDS:
                self._note(ConstraintProblemError("is not a supported keyword", child(pointer, name)))
        asserted = {name: value for name, value in schema.items() if name in SUPPORTED_KEYWORDS}
        for name in ("$defs", "definitions"):
            self._schemas_by_name(schema, name, pointer)
            asserted.pop(name, None)
        for name in IN_PLACE:
            if name in asserted:
                return self._in_place_schema(name, asserted, pointer)
        return self._typed(asserted, pointer)

    def _in_place_schema(self, name: str, schema: dict[str, Any], pointer: str) -> dict[str, Any]:
        value, place = schema[name], child(pointer, name)
        allowed = {name, "type"} if name in ("enum", "const") else {name}
        for other in schema:
            if other not in allowed:
                self._note(ConstraintProblemError(f"is not supported beside {name}", child(pointer, other)))
        if name in ("enum", "const"):
            return {"enum": self._values(value if name == "enum" else [value], place, self._types(schema, pointer) or TYPES)}
        if name == "$ref":
            return self._ref(value, pointer)
        if not isinstance(value, list) or not value:
            raise ConstraintProblemError("is not a list of schemas", place)
        if name == "allOf" and len(value) > 1:
            raise ConstraintProblemError("has more than one schema, which is not supported", place)
        places = [child(place, index) for index in range(len(value))]
        self._in_place[pointer] = places
        return {name: [self._schema(each, at) for each, at in zip(value, places, strict=True)]}

    def _ref(self, value: Any, pointer: str) -> dict[str, Any]:  # noqa: ANN401 - JSON
        if not isinstance(value, str) or not (value == "#" or value.startswith("#/")):
            raise ConstraintProblemError("is not `#` or `#/…`: a reference to anything else is not followed", f"{pointer}/$ref")
        rewritten: dict[str, Any] = {}
        # Written as `child` writes pointers, so that the two compare.
        parts = unquote(value.removeprefix("#")).split("/")[1:]
        target = ""
        for part in parts:
            target = child(target, part.replace("~1", "/").replace("~0", "~"))
        self._refs.append((rewritten, pointer, target))
        return rewritten

    def _values(self, values: Any, pointer: str, types: tuple[str, ...]) -> list[Any]:  # noqa: ANN401 - JSON
        if not isinstance(values, list) or not values:
            raise ConstraintProblemError("is not a list of values", pointer)
        self._count("values", len(values), pointer)
        level = values
        while level:
            for value in level:
                if is_number(value):
                    check_number(value, pointer)
            level = [each for value in level for each in _inner(value)]
            self._count("inner values", len(level), pointer)
        allowed = [value for value in values if any(has_type(value, each) for each in types)]
        if not allowed:
            raise ConstraintProblemError("has no value of the type beside it", pointer)
        return allowed

    def _types(self, schema: dict[str, Any], pointer: str) -> tuple[str, ...]:
        types = schema.get("type", [])
        names = types if isinstance(types, list) else [types]
        if not all(isinstance(name, str) and name in TYPES for name in names) or ("type" in schema and not names):
            raise ConstraintProblemError(f"is not a type or a list of them: {', '.join(TYPES)}", child(pointer, "type"))
        return tuple(dict.fromkeys(names))

    def _typed(self, schema: dict[str, Any], pointer: str) -> dict[str, Any]:
        rewritten: dict[str, Any] = {}
        if types := self._types(schema, pointer):
            rewritten["type"] = types[0] if len(types) == 1 else list(types)
        self._read_number(schema, rewritten, pointer)
        self._read_string(schema, rewritten, pointer)
        self._read_array(schema, rewritten, pointer)
        self._read_object(schema, rewritten, pointer)
        return rewritten

    def _read_number(self, schema: dict[str, Any], rewritten: dict[str, Any], pointer: str) -> None:
        for name in BOUNDS:
            if name in schema:
                check_number(schema[name], child(pointer, name))
                rewritten[name] = schema[name]
        if "multipleOf" in schema:
            place = child(pointer, "multipleOf")
            self._count("multiples", check_multiple(schema["multipleOf"], place), place)
            rewritten["multipleOf"] = schema["multipleOf"]
        types = self._types(schema, pointer)
        if any(name in rewritten for name in BOUNDS):
            self._count("number ranges", 1, pointer)
        check_range(rewritten, pointer, integer="integer" in types and "number" not in types)

    def _read_string(self, schema: dict[str, Any], rewritten: dict[str, Any], pointer: str) -> None:
        _read_counts(schema, rewritten, pointer, ("minLength", "maxLength"), MAX_LENGTH)
        if "pattern" in schema:
            self._check_pattern(schema["pattern"], child(pointer, "pattern"))
            rewritten["pattern"] = schema["pattern"]
        if "format" in schema:
            self._read_format(schema, rewritten, child(pointer, "format"))
        text: dict[str, Any] = {
            name: rewritten[name] for name in ("pattern", "format", "minLength", "maxLength") if name in rewritten
        }
        if "pattern" in schema or ("format" in text and len(text) > 1):
            self.texts[child(pointer, "pattern" if "pattern" in schema else "format")] = {"type": "string", **text}

    def _read_format(self, schema: dict[str, Any], rewritten: dict[str, Any], pointer: str) -> None:
        self._count("patterns", 1, pointer)
        name = schema["format"]
        if not isinstance(name, str) or name not in FORMATS:
            raise ConstraintProblemError(f"is not a supported format: {', '.join(FORMATS)}", pointer)
        rewritten["format"] = name
        if pattern := FORMATS[name]:
            if "pattern" in schema:
                raise ConstraintProblemError("is not supported beside pattern", pointer)
            rewritten["pattern"] = pattern

    def _check_pattern(self, pattern: Any, pointer: str) -> None:  # noqa: ANN401 - JSON
        self._count("patterns", 1, pointer)
        if not isinstance(pattern, str):
            raise ConstraintProblemError("is not a text", pointer)
        try:
            size = check_size(pattern)
        except ConstraintProblemError as error:
            raise type(error)(error.problem, pointer) from None
        self._count("pattern steps", size.steps, pointer)
        self._count("units of work for classes of characters", size.class_work, pointer)

    def _read_array(self, schema: dict[str, Any], rewritten: dict[str, Any], pointer: str) -> None:
        items = _read_counts(schema, rewritten, pointer, ("minItems", "maxItems"))
        if "prefixItems" in schema:
            place = child(pointer, "prefixItems")
            if not isinstance(schema["prefixItems"], list) or not schema["prefixItems"]:
                raise ConstraintProblemError("is not a list of schemas", place)
            first = [self._schema(each, child(place, index)) for index, each in enumerate(schema["prefixItems"])]
            rewritten["prefixItems"] = first
            items = max(items, len(first))
        self._count("items", items, child(pointer, "maxItems" if "maxItems" in schema else "minItems"))
        if "items" in schema:
            rewritten["items"] = self._schema(schema["items"], child(pointer, "items"))

    def _read_object(self, schema: dict[str, Any], rewritten: dict[str, Any], pointer: str) -> None:
        self._count("items", _read_counts(schema, rewritten, pointer, ("minProperties", "maxProperties")), pointer)
        properties = self._schemas_by_name(schema, "properties", pointer)
        required = _required(schema, pointer)
        self._count("properties", len(properties.keys() | set(required)), child(pointer, "properties"))
        for name in (*properties, *required):
            if any(ord(character) < ord(" ") or character == "\x7f" for character in name):
                raise ConstraintProblemError("has a name with a control character", child(pointer, "properties"))
        if rewritten.get("minProperties", 0) > len(required) + 1:
            # The names of further properties may be equal, and then count once.
            raise ConstraintProblemError(
                "is more than one above the number of required properties", child(pointer, "minProperties")
            )
        if required:
            rewritten["required"] = required
        more: Schema | None = None
        if "additionalProperties" in schema:
            more = self._schema(schema["additionalProperties"], child(pointer, "additionalProperties"))
        if "patternProperties" in schema:
            self._read_patterns(schema, rewritten, pointer)
        elif properties or required:
            _close(rewritten, properties, more, pointer)
        elif more is not None:
            rewritten["additionalProperties"] = more

    def _read_patterns(self, schema: dict[str, Any], rewritten: dict[str, Any], pointer: str) -> None:
        patterns = self._schemas_by_name(schema, "patternProperties", pointer)
        for pattern in patterns:
            place = child(child(pointer, "patternProperties"), pattern)
            self._check_pattern(pattern, place)
            self.texts[place] = {"type": "string", "pattern": pattern}
        if schema.get("properties"):
            raise ConstraintProblemError("is not supported beside properties", child(pointer, "patternProperties"))
        if schema.get("additionalProperties", False) is not False:
            raise ConstraintProblemError("is not supported beside patternProperties", child(pointer, "additionalProperties"))
        rewritten |= {"patternProperties": patterns, "additionalProperties": False}

    def _schemas_by_name(self, schema: dict[str, Any], keyword: str, pointer: str) -> dict[str, Schema]:
        schemas, place = schema.get(keyword, {}), child(pointer, keyword)
        if not isinstance(schemas, dict):
            raise ConstraintProblemError("is not an object", place)
        return {name: self._schema(each, child(place, name)) for name, each in schemas.items()}


def _inner(value: Any) -> list[Any]:  # noqa: ANN401 - JSON
    """Returns the values within an array or object; none for any other value."""
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _close(rewritten: dict[str, Any], properties: dict[str, Schema], more: Schema | None, pointer: str) -> None:
    """Completes an object that names properties. `more` is the schema of the others, None if there is none."""
    missing = [name for name in rewritten.get("required", ()) if name not in properties]
    if more is False and missing:
        raise ConstraintProblemError("names a property that additionalProperties excludes", child(pointer, "required"))
    others = True if more is None else more
    rewritten |= {"properties": properties | dict.fromkeys(missing, others), "additionalProperties": False}
    if more is not None and more is not False:
        # With additionalProperties, LLGuidance would allow a named property once more, if its name is written with escapes.
        # With patternProperties, which it takes for all properties but the named ones, it does not.
        rewritten["patternProperties"] = {"": more}


def _required(schema: dict[str, Any], pointer: str) -> list[str]:
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise ConstraintProblemError("is not a list of names", child(pointer, "required"))
    return list(dict.fromkeys(required))


def _read_counts(
    schema: dict[str, Any],
    rewritten: dict[str, Any],
    pointer: str,
    names: tuple[str, str],
    limit: int = MAX_COUNTS["items"],
) -> int:
    """Checks and copies a lower and an upper bound; returns the larger one, or 0 if there is none."""
    counts = []
    for name in names:
        if name in schema:
            if not is_count(schema[name]):
                raise ConstraintProblemError("is not a whole number from 0", child(pointer, name))
            if schema[name] > limit:
                raise ConstraintProblemError(f"is more than {limit}", child(pointer, name))
            rewritten[name] = schema[name]
            counts.append(rewritten[name])
    if sorted(counts) != counts:
        raise ConstraintProblemError(f"is less than {names[0]}", child(pointer, names[1]))
    return max(counts, default=0)
