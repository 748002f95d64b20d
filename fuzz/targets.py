"""Fuzz targets: each takes any bytes, and raises if the server does not do with them what it promises.

The tests try them with a few hundred inputs each, and `python -m fuzz.coverage_guided` with millions.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import copy_context
from typing import Any, Final, cast

import grpc
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.access.callers import caller
from flywheel_server.access.keys import KeyRing
from flywheel_server.access.keys_file import KeysFile
from flywheel_server.errors import MalformedRequestError, UnauthenticatedError, UnknownFieldError, status_of
from flywheel_server.interceptors.authentication import Authentication
from flywheel_server.interceptors.metadata import CallMetadata
from flywheel_server.messages import GenerationRequest, InvalidRequestError, RequestLimits
from flywheel_server.messages import Message as ChatMessage
from flywheel_server.translation import prompt_from_proto, request_from_proto
from flywheel_server.unknown_fields import refuse_unknown_fields
from flywheel_server.violations import name_of
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from fuzz.ranges import CONSTRAINTS, PROMPTS, is_sent, lowest, ranges, wrong_fields

LIMITS: Final = RequestLimits(
    max_text_bytes=200, max_num_samples=16, context_tokens=256, supported_fields=frozenset(GenerationRequest.model_fields)
)
API_KEY: Final = "fw_0123456789abcdef"
RANGES: Final = ranges(LIMITS)
METADATA_BYTES: Final = 8192
"""What gRPC clients take as metadata unless they say otherwise."""

Metadata = tuple[tuple[str, str | bytes], ...]


Refusal = InvalidRequestError | MalformedRequestError | UnknownFieldError


def verdict(data: bytes, kind: type[Message] = pb.GenerationRequest) -> GenerationRequest | Refusal | None:
    """Returns what the server makes of a request that arrives as these bytes: None if a request of this kind is no prompt."""
    try:
        message = kind.FromString(data)
        if isinstance(message, pb.GenerationRequest):
            return request_from_proto(message, LIMITS)
        if isinstance(message, pb.TokenizeRequest):
            return prompt_from_proto(message, LIMITS)
        refuse_unknown_fields(message)
    except DecodeError:
        return MalformedRequestError()
    except (InvalidRequestError, UnknownFieldError) as error:
        return error
    return None


def request(data: bytes) -> None:
    """Checks that a request arrives unchanged if all its fields are in range. If not, exactly the wrong fields are named."""
    found = verdict(data)
    if isinstance(found, MalformedRequestError):
        return
    message = pb.GenerationRequest.FromString(data)
    if isinstance(found, UnknownFieldError):
        assert set(found.fields) <= {*_unknown_fields(message, "")}
        _check_refusal(found)
        return
    wrong = wrong_fields(message, RANGES)
    if isinstance(found, InvalidRequestError):
        assert {*map(name_of, found.violations)} == wrong
        _check_refusal(found)
        return
    assert isinstance(found, GenerationRequest)
    assert not wrong
    assert not [*_unknown_fields(message, "")]
    for name, field in GenerationRequest.model_fields.items():
        default = field.get_default(call_default_factory=True)
        assert getattr(found, name) == (arrived(getattr(message, name)) if is_sent(message, name) else default)


def prompt(data: bytes) -> None:
    """Checks that a prompt to tokenize is accepted or refused as the same prompt of a generation is."""
    found = verdict(data, pb.TokenizeRequest)
    if isinstance(found, MalformedRequestError | UnknownFieldError):
        return
    message = pb.TokenizeRequest.FromString(data)
    same = pb.GenerationRequest(text=message.text, messages=message.messages, max_tokens=1)
    # A prompt to tokenize has one field less to choose from.
    assert str(found) == str(verdict(same.SerializeToString())).replace(", messages and prompt_token_ids", " and messages")


def _check_refusal(error: Exception) -> None:
    status = status_of(error, "id")
    assert status.code is grpc.StatusCode.INVALID_ARGUMENT
    assert len(status.message.encode()) + sum(len(value) for _, value in status.trailing_metadata()) < METADATA_BYTES


def arrived(value: Any) -> object:  # noqa: ANN401 - the value of any field
    """Returns the value of a field of the contract as the server's own messages have it."""
    match value:
        case str() | int() | float():
            return value
        case pb.Choices():
            return tuple(value.texts)
        case Mapping():
            return dict(value)
        case _:
            return tuple(_message(each) if isinstance(each, pb.Message) else each for each in value)


def _message(message: pb.Message) -> ChatMessage:
    return ChatMessage(role=message.role, content=message.content)


def _unknown_fields(message: Message, path: str) -> Iterator[tuple[str, int]]:
    """Yields all unknown fields of a message: the path of the message that has the field, and its number."""
    for field in cast("Iterable[Any]", UnknownFieldSet(message)):
        yield path, field.field_number
    if isinstance(message, pb.GenerationRequest):
        for index, each in enumerate(message.messages):
            yield from _unknown_fields(each, f"messages[{index}]")
        if message.HasField("choices"):
            yield from _unknown_fields(message.choices, "choices")


def request_ids(data: bytes) -> None:
    """Checks that the id of a call is the id that was sent, if it is valid, and otherwise a new id."""
    metadata = _metadata(data)
    found = CallMetadata.of(metadata).request_id
    sent = next((value for key, value in metadata if key == "x-request-id"), "")
    if isinstance(sent, str) and 1 <= len(sent) <= 128 and all(33 <= ord(character) <= 126 for character in sent):
        assert found == sent
    else:
        assert re.fullmatch("[0-9a-f]{32}", found)


_KEYS: Final = Authentication(KeyRing([API_KEY]), certificates=False)


def authorization(data: bytes) -> None:
    """Checks that a caller may call if it sends the key, once and as a bearer, and that no other caller may."""
    metadata = _metadata(data)
    sent = [value for key, value in metadata if key == "authorization"]
    match sent:
        case [str(only)]:
            has_key = only[:7].lower() == "bearer " and only[7:].lstrip(" ") == API_KEY
        case _:
            has_key = False
    try:
        name = copy_context().run(_caller_with, metadata)
    except UnauthenticatedError as error:
        assert not has_key
        assert API_KEY not in status_of(error, "id").message
    else:
        assert has_key
        assert name == "FLYWHEEL_API_KEYS-1"


def keys_file(data: bytes) -> None:
    """Checks that a file of keys is refused with one line, or is read, and is the same after it is written and read again."""
    try:
        found = KeysFile.parse(data)
    except ValueError as error:
        assert str(error)
        assert str(error).isprintable()
        return
    written = KeysFile.parse(found.model_dump_json().encode())
    assert written.keys == tuple(
        entry.model_copy(
            update={
                "created": entry.created.replace(microsecond=0),
                "expires": entry.expires and entry.expires.replace(microsecond=0),
            }
        )
        for entry in found.keys
    )


def _metadata(data: bytes) -> Metadata:
    """Returns the metadata in lines of `key:value`, in the form in which grpc gives it to a servicer."""
    entries = (line.partition(b":") for line in data.split(b"\n"))
    return tuple((key.decode(errors="replace"), _decoded(key, value)) for key, _, value in entries)


def _decoded(key: bytes, value: bytes) -> str | bytes:
    return value if key.endswith(b"-bin") else value.decode(errors="replace")


def _caller_with(metadata: Metadata) -> str:
    """Returns the name of the caller that sends this metadata."""
    context: Any = None  # not asked, because callers have no certificates
    _KEYS.identify(context, CallMetadata.of(metadata))
    return caller.get().name


TARGETS: Final[Mapping[str, Callable[[bytes], None]]] = {
    "request": request,
    "prompt": prompt,
    "request_ids": request_ids,
    "authorization": authorization,
    "keys_file": keys_file,
}

_FULL: Final = lowest(RANGES) | {
    "text": "hello 🦙",
    "max_tokens": 3,
    "max_input_tokens": 5,
    "num_samples": 2,
    "stop": ["a", "END"],
    "top_p": 0.5,
    "messages": [pb.Message(role="system", content="be brief"), pb.Message(role="user")],
    "seed": 7,
    "logit_bias": {5: -1.5, 6: 2.0},
    "logprobs": 2,
    "time_limit": 9.5,
}
"""A value for each field."""


def _full(prompt: str, constraint: str) -> bytes:
    """Returns a request that has each field, but only one prompt and one constraint."""
    left_out = {*PROMPTS, *CONSTRAINTS} - {prompt, constraint}
    return pb.GenerationRequest(**{name: value for name, value in _FULL.items() if name not in left_out}).SerializeToString()


_ENTRY: Final = b'{"name":"a","hash":"sha256:%s","created":"2026-01-02T03:04:05Z","priority":-1,"max_concurrent":8}' % (
    b"0" * 64
)
_CERTIFIED: Final = (
    b'{"name":"b","certificate":"spiffe://x/y","created":"2026-01-02T03:04:05Z","expires":"2027-01-01T00:00:00Z"}'
)

SEEDS: Final[Mapping[str, tuple[bytes, ...]]] = {
    "request": (
        b"",
        pb.GenerationRequest(text="x", max_tokens=1).SerializeToString(),
        pb.GenerationRequest(
            text="hello 🦙", max_tokens=3, max_input_tokens=5, num_samples=2, stop=["a", "END"], top_p=0.5
        ).SerializeToString(),
        *map(_full, PROMPTS, CONSTRAINTS),
        pb.GenerationRequest(text="x", messages=[pb.Message()], prompt_token_ids=[-1], max_tokens=1).SerializeToString(),
        pb.GenerationRequest(text="x", max_tokens=1, regex="a").SerializeToString() + b"\xf8\x07\x01",
        pb.GenerationRequest(max_tokens=1, messages=[pb.Message.FromString(b"\n\x01u\x1a\x01x")]).SerializeToString(),
        pb.GenerationRequest(text="x" * 201, max_tokens=-1, stop=[""] * 17, top_p=math.nan).SerializeToString(),
    ),
    "prompt": (
        pb.TokenizeRequest(text="hello 🦙").SerializeToString(),
        pb.TokenizeRequest(messages=[pb.Message(role="system"), pb.Message(role="user", content="x")]).SerializeToString(),
        pb.TokenizeRequest(text="x", messages=[pb.Message(role="User")]).SerializeToString(),
    ),
    "request_ids": (b"x-request-id:id-7", b"x-request-id:with a space", b"x-request-id:1\nx-request-id:2", b"x-bin:\xff"),
    "authorization": (
        b"authorization:Bearer " + API_KEY.encode(),
        b"authorization:bearer   " + API_KEY.encode(),
        b"authorization:Basic " + API_KEY.encode(),
        b"authorization:Bearer " + API_KEY.encode() + b"\nauthorization:Bearer x",
        b"authorization:Bearer \xc3\xa9",
    ),
    "keys_file": (
        b'{"keys":[]}',
        b'{"keys":[%s,%s]}' % (_ENTRY, _CERTIFIED),
        b'{"keys":[%s,%s]}' % (_ENTRY, _ENTRY),
        b'{"keys":[{"name":1,"hash":"x","other":2}],"more":3}',
        b'{"ke\x7fs":[]}',
        b'{"keys":[%s]}' % _CERTIFIED.replace(b"2027", b"0027"),
        b'{"keys":[%s]}' % _CERTIFIED.replace(b"2027-01-01T00:00:00Z", b"9999-12-31T23:59:59-01:00"),
    ),
}
"""The first inputs of each target."""
