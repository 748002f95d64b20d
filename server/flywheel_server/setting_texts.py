"""Reads the text of environment variables and flags, for the settings of both a server and a deployment.

An empty variable counts as not set: `${X:-}` in a Docker Compose file, or a template, leaves one if the value is not set.
The exception are the settings that decide who may call. They must not be empty, because a missing secret would open the server.
"""

import re
from collections.abc import Iterable
from functools import cache
from typing import Any, Final, Literal, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUseDefault

MAX_PORT: Final = 65535

NONE: Final = "none"
"""The word for no value, for settings that accept it. An empty text means the default instead."""

MUST_HOLD: Final = "must_hold"
"""The key in a field's `json_schema_extra` that makes an empty text an error, and says in words what the field must hold."""


def is_blank(text: str | None) -> bool:
    """Returns whether a variable counts as not set: it does not exist (None), or its text is blank."""
    return text is None or not text.strip()


def without_none_word(value: Any) -> Any:  # noqa: ANN401 - whatever a field is given
    """Returns None for the word `NONE`, in upper or lower case, and any other value unchanged."""
    return None if isinstance(value, str) and value.lower() == NONE else value


NoneWord: Final = BeforeValidator(without_none_word)


def http_url(text: str) -> str:
    """Returns the text unchanged; raises `ValueError` if it is not a URL of a host, and perhaps a port, with http or https."""
    found = re.fullmatch(r"https?://(?:[^][\s/@:?#]+|\[[^][\s/@]+\])(?::([0-9]{1,5}))?/?", text)
    if found is None or not 1 <= int(found[1] or MAX_PORT) <= MAX_PORT:
        rules = f"with a port of 1 to {MAX_PORT} and an IPv6 address in brackets"
        raise ValueError(f"must be a URL such as http://HOST:PORT or https://HOST:PORT, {rules}")
    return text


def choices(field: FieldInfo) -> tuple[str, ...]:
    """Returns the allowed values of a `Literal` field; empty for other fields."""
    kinds = (field.annotation, *get_args(field.annotation))
    return next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), ())


def normalized(value: Any, field: FieldInfo) -> Any:  # noqa: ANN401 - whatever a field is given
    """Returns a text in the form that the field's validators expect, and any other value unchanged.

    Strips spaces, and lowers the case of a choice. Raises `PydanticUseDefault` if the text is empty, or `ValueError` if the
    field must not be empty or the text is not UTF-8.
    """
    if not isinstance(value, str) or value == field.default:
        return value
    # Python keeps undecodable bytes as surrogates, which neither llama.cpp nor a message to callers can have.
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
    """Returns the location of each problem, as pydantic gives it, and its message, which does not have the value."""
    found = error.errors(include_url=False, include_input=False, include_context=False)
    return [(item["loc"], _message(item["type"], item["msg"], item["loc"], settings)) for item in found]


def places(location: Iterable[int | str]) -> list[str]:
    """Returns the parts of a location that pydantic gives in words, such as `number 2` for the second of several keys."""
    return [f"number {part + 1}" if isinstance(part, int) else part for part in location]


def _message(kind: str, message: str, location: tuple[int | str, ...], settings: type[BaseModel]) -> str:
    # These messages already say what is accepted.
    if kind in {"value_error", "literal_error"} or len(location) > 1:
        return message.removeprefix("Value error, ")
    accepted = accepted_by(settings, str(location[0]))
    return f"{message} (accepted: {accepted})" if accepted else message


def accepted_by(settings: type[BaseModel], name: str) -> str:
    """Returns in words which values a setting accepts; empty if the schema does not say."""
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
            # An exclusive minimum is stricter than an inclusive one, so it is shown if there are both.
            from_least = f"above {schema['exclusiveMinimum']}," if "exclusiveMinimum" in schema else f"from {least}"
            return f"{noun} {from_least} to {most}"
    return ""
