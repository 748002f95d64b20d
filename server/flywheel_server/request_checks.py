"""Checks what a caller sends as a request, and says everything that is wrong with it in words."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from types import UnionType
from typing import Annotated, Any, Final, get_args, get_origin

from pydantic import BaseModel, ValidationError

from flywheel_server.messages import (
    CONSTRAINT_FIELDS,
    MAX_VIOLATIONS,
    PROMPT_FIELDS,
    SERVER_FIELDS,
    FieldViolation,
    GenerationRequest,
    InvalidRequestError,
    Must,
    RequestLimits,
    wrong_combinations,
)
from flywheel_server.violations import name_of

MODEL_FIELDS: Final = ("messages", "prompt_token_ids", "logit_bias", *CONSTRAINT_FIELDS)
"""The fields of which only the engine can tell whether the model takes their values."""


def checked_request(
    limits: RequestLimits, fields: dict[str, Any], prompt_fields: Sequence[str] = PROMPT_FIELDS
) -> GenerationRequest:
    """Returns the request with these fields, or raises `InvalidRequestError` with every violation.

    `prompt_fields` are the fields among which the caller chooses one for the prompt.
    """
    violations: list[FieldViolation] = []
    request = None
    try:
        request = GenerationRequest.model_validate(fields, context=limits)
    except ValidationError as error:
        violations = _violations(error, fields, limits, prompt_fields)
    # Nothing is raised within `except`, because the new error would then hold on to pydantic's. The garbage collector cannot
    # see into an error of pydantic. Such an error holds the errors of our validators, and their frames hold the request.
    if request is not None and limits.supported_fields.issuperset(fields):
        return request
    unsupported = [name for name in fields if name not in limits.supported_fields and name not in SERVER_FIELDS]
    if request is not None and not unsupported:
        return request
    # The value of a field that is not supported does not matter.
    violations = [each for each in violations if name_of(each) not in unsupported]
    violations += [FieldViolation(name, "is not supported: GetModel returns the supported fields") for name in unsupported]
    raise InvalidRequestError(violations, unsupported, _unchecked(fields, {name_of(each) for each in violations}))


def _unchecked(fields: Mapping[str, Any], wrong: Collection[str]) -> GenerationRequest | None:
    """Returns those of the fields that only the engine can check, but for wrong ones, as a valid request."""
    given = {name: fields[name] for name in MODEL_FIELDS if name in fields and name not in wrong}
    if not given:
        return None
    prompt = {} if any(given.get(name) for name in PROMPT_FIELDS) else {"text": "a"}
    return GenerationRequest(max_tokens=1, **prompt, **given)


def _words(path: str, annotation: Any, metadata: Sequence[Any] = ()) -> Iterator[tuple[str, str]]:  # noqa: ANN401
    """Yields the path of each part of a value that has this annotation, with `[]` for an element, and its range in words."""
    yield from ((path, f"must {each.words}") for each in metadata if isinstance(each, Must))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for name, field in annotation.model_fields.items():
            yield from _words(f"{path}.{name}", field.annotation, field.metadata)
    elif get_origin(annotation) is Annotated:
        yield from _words(path, annotation.__origin__, annotation.__metadata__)
    else:
        part_path = path if get_origin(annotation) is UnionType else f"{path}[]"
        for part in get_args(annotation):
            yield from _words(part_path, part)


_WORDS: Final = {path.removeprefix("."): words for path, words in _words("", GenerationRequest)}

_MAX_ELEMENTS: Final[Mapping[str, int]] = {
    name: constraint.max_length
    for name, field in GenerationRequest.model_fields.items()
    for constraint in field.metadata
    if hasattr(constraint, "max_length")
}


def _violations(
    error: ValidationError, fields: Mapping[str, Any], limits: RequestLimits, prompt_fields: Sequence[str]
) -> list[FieldViolation]:
    """Returns the violations, each once: both the id and the value of a bias may be wrong."""
    bounds = asdict(limits)
    violations: list[FieldViolation] = []
    for location in (*_too_long(fields, limits), *_locations(error, fields)):
        path, words = _path_and_words(location)
        violations.append(FieldViolation(path, words.format(**bounds)))
    violations += [
        FieldViolation(each.field, each.description.format(**bounds)) for each in wrong_combinations(fields, prompt_fields)
    ]
    return list(dict.fromkeys(violations))


def _too_long(fields: Mapping[str, Any], limits: RequestLimits) -> Iterator[tuple[str]]:
    """Yields where there are too many elements, which pydantic does not say if one of them is wrong."""
    most = {**_MAX_ELEMENTS, "prompt_token_ids": limits.context_tokens}
    yield from ((name,) for name, value in fields.items() if name in most and len(value) > most[name])


def _locations(error: ValidationError, fields: Mapping[str, Any]) -> Iterator[Sequence[int | str]]:
    """Yields where pydantic has found something wrong."""
    for item in error.errors(include_url=False, include_input=False):
        location = item["loc"]
        match location:
            case ():
                pass  # the combination of the fields
            case (str(name),) if item["type"] == "too_short" and fields[name]:
                pass  # pydantic counts only the elements that are valid
            case ("prompt_token_ids", int(first)):
                # pydantic has stopped at the first wrong one.
                wrong = (index for index, token_id in enumerate(fields["prompt_token_ids"]) if index >= first and token_id < 0)
                yield from (("prompt_token_ids", index) for index in islice(wrong, MAX_VIOLATIONS))
            case _:
                yield location


def _path_and_words(location: Sequence[int | str]) -> tuple[str, str]:
    """Returns the path of a wrong field or element, such as `messages[2].role`, and the words for its range."""
    path = pattern = str(location[0])
    for part in location[1:]:
        if isinstance(part, int):
            path, pattern = f"{path}[{part}]", f"{pattern}[]"
        elif f"{pattern}.{part}" in _WORDS:
            path, pattern = f"{path}.{part}", f"{pattern}.{part}"
    return path, _WORDS.get(pattern) or _WORDS[str(location[0])]
