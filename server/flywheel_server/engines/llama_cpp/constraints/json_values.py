"""Reads JSON, and tells what its values are."""

import json
from typing import Any, Final

from flywheel_server.engines.llama_cpp.constraints.constraint_problem import ConstraintProblemError

MAX_DEPTH: Final = 64
"""Maximum number of objects and arrays that are within each other."""

_TYPES: Final[dict[type, str]] = dict(
    zip(
        (type(None), bool, int, float, str, list, dict),
        ("null", "boolean", "integer", "number", "string", "array", "object"),
        strict=True,
    )
)

TOO_DEEP: Final = f"has more than {MAX_DEPTH} arrays and objects within each other"


def read_object(text: str) -> dict[str, Any]:
    """Returns the JSON object in the text. Raises `ConstraintProblemError` if there is none, or it is nested too deep."""
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_float=_number, parse_constant=_constant)
    except ConstraintProblemError:
        raise
    except RecursionError:
        raise ConstraintProblemError(TOO_DEEP) from None
    except json.JSONDecodeError as error:
        raise ConstraintProblemError(f"is not JSON: {error}") from None
    except ValueError:  # a number with thousands of digits
        raise ConstraintProblemError("has a number that is too long") from None
    if not isinstance(value, dict):
        raise ConstraintProblemError("is not a JSON object")
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [each for parent in level for each in (parent.values() if isinstance(parent, dict) else parent)]
        level = [each for each in level if isinstance(each, dict | list)]
        if not level:
            return value
    raise ConstraintProblemError(TOO_DEEP)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) < len(pairs):
        raise ConstraintProblemError("is not JSON: a name is twice in one object")
    return names


def _number(text: str) -> int | float:
    """Returns the number; an integer for 1.0, which JSON Schema takes for 1."""
    number = float(text)
    return int(number) if number.is_integer() else number


def _constant(name: str) -> None:
    raise ConstraintProblemError(f"is not JSON: {name}")


def child(pointer: str, name: str | int) -> str:
    """Returns the JSON pointer (RFC 6901) of a member or item."""
    return f"{pointer}/{str(name).replace('~', '~0').replace('/', '~1')}"


def is_count(value: Any) -> bool:  # noqa: ANN401 - JSON
    """Returns whether a value is a whole number from 0."""
    return has_type(value, "integer") and value >= 0


def type_of(value: Any) -> str:  # noqa: ANN401 - JSON
    """Returns the type of a value in JSON Schema; "integer" for a whole number."""
    return _TYPES[type(value)]


def has_type(value: Any, name: str) -> bool:  # noqa: ANN401 - JSON
    """Returns whether a value is of a type of JSON Schema."""
    its_type = type_of(value)
    return its_type == name or (its_type == "integer" and name == "number")
