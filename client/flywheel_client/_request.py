"""Building requests from keyword arguments."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Required, TypedDict, TypeVar, Unpack

from flywheel_proto.v1 import generation_pb2

RequestT = TypeVar("RequestT", generation_pb2.GenerationRequest, generation_pb2.TokenizeRequest)


@dataclass(frozen=True, slots=True)
class Message:
    """A message of a conversation: who speaks, such as "system", "user" or "assistant", and what is said."""

    role: str
    content: str


Messages = Iterable[Message | Mapping[str, str] | tuple[str, str]]
"""A conversation. A message may also be a mapping, such as `{"role": "user", "content": "Hello"}`, or a pair of both texts."""

Prompt = str | Messages | Mapping[str, Any]
"""A prompt of `generate_many`: a text, a conversation, or fields by name, such as `{"text": "Hello", "seed": 1}`."""


class GenerationFields(TypedDict, total=False):
    """The fields of a GenerationRequest besides its text, as keyword arguments.

    None, like leaving the argument out, leaves the field unset, so that the server's default holds; an explicit 0
    arrives as 0. The server checks the ranges, which `Client.model()` tells, and reports every violation at once.
    """

    max_tokens: Required[int]
    """The most tokens to generate for each sample."""

    eos_token_ids: Iterable[int] | None
    """Token ids that end a sample, besides the model's own end-of-generation tokens."""

    max_input_tokens: int | None
    """The most prompt tokens to read: of a longer prompt the last ones are kept. 0 keeps the whole prompt."""

    num_samples: int | None
    """How many independent samples to generate. Default: 1."""

    stop: Iterable[str] | None
    """Stop sequences: the first to appear ends the sample and is not part of its text."""

    temperature: float | None
    """Divides the logits before sampling; 0 always takes the likeliest token. Default: 1.0."""

    top_k: int | None
    """Samples only from the top_k likeliest tokens; 0 does not restrict. Default: 50."""

    top_p: float | None
    """Samples only from the likeliest tokens whose probabilities add up to top_p; 1 does not restrict. Default: 1.0."""

    presence_penalty: float | None
    """Lowers the logit of every token that occurs in the text so far; -2 to 2. Default: 0.0."""

    frequency_penalty: float | None
    """Lowers the logit of a token for each time it occurs in the text so far; -2 to 2. Default: 0.0."""

    messages: Messages | None
    """The prompt as a conversation, instead of a text. If the last message is the assistant's, the model continues it."""

    prompt_token_ids: Iterable[int] | None
    """The prompt as token ids, instead of a text. The model reads them exactly as they are."""

    seed: int | None
    """Makes the samples repeatable, as far as `Model.exact_seeds` promises. Default: the server draws a seed."""

    min_p: float | None
    """Samples only from tokens at least min_p times as likely as the likeliest one; 0 to 1. Default: 0.0."""

    repetition_penalty: float | None
    """Above 1, makes tokens that occur in the text so far less likely; greater than 0. Default: 1.0."""

    logit_bias: Mapping[int, float] | None
    """Is added to the logits of tokens, by token id; -100 to 100 each."""

    json_schema: str | Mapping[str, Any] | None
    """The text is a JSON document that is valid under this JSON Schema, which is JSON, or a mapping that becomes JSON.

    With pydantic: `json_schema=MyModel.model_json_schema()`.
    """

    regex: str | None
    """The whole text matches this regular expression, in the syntax of Rust's regex crate."""

    choices: Iterable[str] | None
    """The text is one of these texts. A request has at most one of json_schema, regex and choices."""

    logprobs: int | None
    """How many of the likeliest tokens to return for each generated token; 0 returns no tokens. Default: 0."""

    time_limit: float | None
    """Seconds after which a sample ends with the text so far, and finish_reason "time"; 0 sets no limit. Default: 0.0."""

    priority: int | None
    """Below 0, lets other calls go first while this call waits in the server; -1000 to 0. Default: 0."""


_PROMPT_FIELDS: Final = ("text", "messages", "prompt_token_ids")
_CONSTRAINT_FIELDS: Final = ("json_schema", "regex", "choices")


def generation_request(text: str | None = None, **fields: Unpack[GenerationFields]) -> generation_pb2.GenerationRequest:
    """Returns the request with these fields; those that are None stay unset.

    Raises:
        TypeError: A field has the wrong type or is not a field of the contract; max_tokens or the prompt is missing; or more
            than one of json_schema, regex and choices is given.
        ValueError: A value cannot be put into its field: an integer beyond 32 bits, a text that is not Unicode, or a schema
            that is not JSON.
    """
    request = common_request(**fields)
    _fill(request, {"text": text})
    _require_prompt({"text": text, **fields}, _PROMPT_FIELDS)
    return request


def common_request(**fields: Unpack[GenerationFields]) -> generation_pb2.GenerationRequest:
    """Returns the request with these fields, perhaps without a prompt. The errors are the same as for `generation_request`."""
    if fields.get("max_tokens") is None:
        raise TypeError("max_tokens is required")
    request = generation_pb2.GenerationRequest()
    _fill(request, fields)
    return request


def request_for(common: generation_pb2.GenerationRequest, position: int, prompt: Prompt) -> generation_pb2.GenerationRequest:
    """Returns the request for a prompt of `generate_many`: the common fields, and the prompt's own, which take precedence.

    The errors are the same as for `generation_request`. They name the position of the prompt.
    """
    request = generation_pb2.GenerationRequest()
    request.CopyFrom(common)
    if isinstance(prompt, str):
        fields: Mapping[str, Any] = {"text": prompt}
    elif isinstance(prompt, Mapping):
        fields = prompt
    else:
        fields = {"messages": prompt}
    for name in fields:
        if name in request.DESCRIPTOR.fields_by_name:
            request.ClearField(name)  # type: ignore[arg-type]
    try:
        _fill(request, fields)
    except (TypeError, ValueError) as error:
        raise type(error)(f"prompts[{position}]: {error}") from error
    return request


def tokenize_request(text: str | None, messages: Messages | None) -> generation_pb2.TokenizeRequest:
    """Returns the request for the tokens of a prompt. The errors are the same as for `generation_request`."""
    request = generation_pb2.TokenizeRequest()
    fields = {"text": text, "messages": messages}
    _require_prompt(fields, tuple(fields))
    _fill(request, fields)
    return request


def _require_prompt(fields: Mapping[str, Any], names: tuple[str, ...]) -> None:
    if all(fields.get(name) is None for name in names):
        raise TypeError(f"a prompt is required: {', '.join(names[:-1])} or {names[-1]}")


def _fill(request: RequestT, fields: Mapping[str, Any]) -> None:
    constraints = [name for name in _CONSTRAINT_FIELDS if fields.get(name) is not None]
    if len(constraints) > 1:
        # In the message they exclude each other, so that the last one would replace the others.
        raise TypeError(f"only one of {' and '.join(constraints)} may be given")
    for name, value in fields.items():
        if name not in request.DESCRIPTOR.fields_by_name:
            raise TypeError(f"{name} is not a field of {request.DESCRIPTOR.name}")
        if value is not None:
            _set(request, name, value)


def _set(request: Any, name: str, value: Any) -> None:  # noqa: ANN401 - the fields have several types
    """Sets a field of a request."""
    field = getattr(request, name)
    if isinstance(value, str) and (name == "choices" or hasattr(field, "extend")):
        # A text is a sequence of texts: without this, stop="END" would mean three stop sequences.
        raise TypeError(f"{name} must be a sequence, not one text")
    if name == "messages":
        with _naming(name):
            value = list(value)
        for index, message in enumerate(value):
            _add_message(field, f"messages[{index}]", message)
        return
    with _naming(name):
        match name:
            case "logit_bias":
                field.update(value)
            case "json_schema":
                request.json_schema = value if isinstance(value, str) else _schema_text(value)
            case "choices":
                # A constraint without choices is sent too, so that the server refuses it.
                field.SetInParent()
                field.texts.extend(value)
            case _ if hasattr(field, "extend"):
                field.extend(value)
            case _:
                setattr(request, name, value)


def _add_message(field: Any, path: str, message: object) -> None:  # noqa: ANN401 - protobuf's container
    """Adds a message of a conversation to the field. `path` names the message in errors."""
    match message:
        case Message(role, content) | (role, content):
            parts = {"role": role, "content": content}
        case Mapping():
            parts = dict(message)
        case _:
            raise TypeError(f"{path} must be a Message, a mapping with role and content, or a pair of both")
    added = field.add()
    for name in dict.fromkeys(("role", "content", *parts)):
        if name not in added.DESCRIPTOR.fields_by_name:
            raise TypeError(f"{path}.{name} is not a field of a message")
        if name not in parts:
            raise TypeError(f"{path}.{name} is missing")
        with _naming(f"{path}.{name}"):
            setattr(added, name, parts[name])


def _schema_text(schema: object) -> str:
    if not isinstance(schema, Mapping):
        raise TypeError("a JSON Schema is a text or a mapping; of a pydantic model, it is MyModel.model_json_schema()")
    try:
        return json.dumps(schema, ensure_ascii=False, allow_nan=False)
    except RecursionError:
        raise ValueError("too many levels") from None


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Names the field in the errors of setting it."""
    try:
        yield
    except UnicodeError as error:
        raise ValueError(f"{path} cannot be encoded in UTF-8: {error}") from error
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{path}: {error}") from error
    except TypeError as error:
        raise TypeError(f"{path} has the wrong type: {error}") from error
