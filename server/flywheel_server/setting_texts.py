"""How the text of a variable or a flag is read, for the settings of a server and of a deployment alike.

An empty variable counts as not set: `${X:-}` in a file of Docker Compose, or a template, leaves one behind where nobody has set
anything. The settings that say who may call are the exception. An empty one is refused: otherwise a secret that went missing
would open the server.
"""

import re
from collections.abc import Iterable
from functools import cache
from typing import Any, Final, Literal, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUseDefault

NONE: Final = "none"
"""How to ask for no value, of a setting that may have none. An empty value would ask for the default."""

MUST_HOLD: Final = "must_hold"
"""The key in a field's `json_schema_extra` for what it must hold if it is given: an empty text is refused."""


def is_blank(text: str | None) -> bool:
    """Return whether a variable with this text, or None if there is no such variable, counts as not set."""
    return text is None or not text.strip()


def without_none_word(value: Any) -> Any:  # noqa: ANN401 - whatever a field is given
    """Return None for the word `NONE`, in any case, and anything else as it is."""
    return None if isinstance(value, str) and value.lower() == NONE else value


NoneWord: Final = BeforeValidator(without_none_word)


def choices(field: FieldInfo) -> tuple[str, ...]:
    """Return the values that a field chooses from; none if it is no choice."""
    kinds = (field.annotation, *get_args(field.annotation))
    return next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), ())


def as_written(value: Any, field: FieldInfo) -> Any:  # noqa: ANN401 - whatever a field is given
    """Return a text as the validators of the field expect it, and any other value as it is.

    Spaces around a text make no difference, and upper case makes none in a choice. Raises `PydanticUseDefault` for an empty
    text, or `ValueError` if the field must not be empty, or the text has bytes that are not UTF-8.
    """
    if not isinstance(value, str) or value == field.default:
        return value
    # What Python cannot decode it keeps as surrogates, which neither llama.cpp nor a message to callers can have.
    if re.search("[\ud800-\udfff]", value):
        raise ValueError("must be text in UTF-8")
    text = value.strip()
    if text:
        return text.lower() if text.lower() in choices(field) else text
    extra = field.json_schema_extra
    if isinstance(extra, dict) and extra.get(MUST_HOLD):
        raise ValueError(f"must hold {extra[MUST_HOLD]}: it is empty")
    raise PydanticUseDefault


def problems_of(error: ValidationError, settings: type[BaseModel]) -> list[tuple[tuple[int | str, ...], str]]:
    """Return where each problem with the settings is, as pydantic locates it, and what it is, without the value."""
    found = error.errors(include_url=False, include_input=False, include_context=False)
    return [(item["loc"], _message(item["type"], item["msg"], item["loc"], settings)) for item in found]


def places(location: Iterable[int | str]) -> list[str]:
    """Return in words the parts of a place that pydantic locates, such as a key among several."""
    return [f"number {part + 1}" if isinstance(part, int) else part for part in location]


def _message(kind: str, message: str, location: tuple[int | str, ...], settings: type[BaseModel]) -> str:
    # Our own validators say what they accept, and so does pydantic of a choice.
    if kind in {"value_error", "literal_error"} or len(location) > 1:
        return message.removeprefix("Value error, ")
    accepted = accepted_by(settings, str(location[0]))
    return f"{message} (accepted: {accepted})" if accepted else message


def accepted_by(settings: type[BaseModel], name: str) -> str:
    """Return in words which values a setting accepts; empty if only its validators know."""
    schema = _schema(settings)["properties"][name]
    words = [_in_words(one) for one in schema.get("anyOf", [schema])]
    if NoneWord in settings.model_fields[name].metadata:
        words.append(f"the word {NONE}")
    return " or ".join(filter(None, words))


@cache
def _schema(settings: type[BaseModel]) -> dict[str, Any]:
    return settings.model_json_schema()


def _in_words(schema: dict[str, Any]) -> str:
    match schema:
        case {"enum": [*values]}:
            return ", ".join(values)
        case {"type": "string", "format": str(words)}:
            return words
        case {"type": "string"}:
            return "any text"
        case {"type": "boolean"}:
            return "true or false"
        case {"type": "integer" | "number" as kind, "minimum": least, "maximum": most}:
            noun = "a whole number" if kind == "integer" else "a number"
            # A bound that is excluded is stricter than the other one.
            return (
                f"{noun} above {schema['exclusiveMinimum']}, to {most}"
                if "exclusiveMinimum" in schema
                else (f"{noun} from {least} to {most}")
            )
    return ""
