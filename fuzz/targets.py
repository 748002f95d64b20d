"""Fuzz targets: each takes bytes from anywhere, and raises where the server does not do with them what it promises.

The tests try them with a few hundred inputs each, and `python -m fuzz.coverage_guided` with millions.
"""

import math
import re
from collections.abc import Callable, Mapping
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any, Final

import grpc
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.access.callers import caller
from flywheel_server.access.keys import KeyRing
from flywheel_server.access.keys_file import KeysFile
from flywheel_server.errors import MalformedRequestError, UnauthenticatedError, status_of
from flywheel_server.interceptors.authentication import Authentication
from flywheel_server.interceptors.metadata import CallMetadata
from flywheel_server.messages import GenerationRequest, InvalidRequestError, RequestLimits
from flywheel_server.translation import request_from_proto
from google.protobuf.message import DecodeError, Message

LIMITS: Final = RequestLimits(max_text_bytes=200, max_num_samples=16, context_tokens=256)
API_KEY: Final = "fw_0123456789abcdef"
METADATA_BYTES: Final = 8192
"""What gRPC clients take as metadata unless they say otherwise."""

Metadata = tuple[tuple[str, str | bytes], ...]


def verdict(
    data: bytes, kind: type[Message] = pb.GenerationRequest
) -> GenerationRequest | InvalidRequestError | MalformedRequestError | None:
    """Returns what the server makes of a request that arrives as these bytes; None of one without fields."""
    try:
        message = kind.FromString(data)
        return request_from_proto(message, LIMITS) if isinstance(message, pb.GenerationRequest) else None
    except DecodeError:
        return MalformedRequestError()
    except InvalidRequestError as error:
        return error


def request(data: bytes) -> None:
    """A request arrives unchanged if all of its fields are in range; if not, exactly those that are not are named."""
    found = verdict(data)
    if isinstance(found, MalformedRequestError):
        return
    message = pb.GenerationRequest.FromString(data)
    wrong = {name for name in GenerationRequest.model_fields if not _is_in_range(name, _value(message, name))}
    if isinstance(found, InvalidRequestError):
        named = [violation.field.partition("[")[0] for violation in found.violations]
        assert sorted(named) == sorted(wrong)
        status = status_of(found, "id")
        assert status.code is grpc.StatusCode.INVALID_ARGUMENT
        assert len(status.message.encode()) + sum(len(value) for _, value in status.trailing_metadata()) < METADATA_BYTES
    else:
        assert not wrong
        for name in GenerationRequest.model_fields:
            assert getattr(found, name) == _value(message, name)


def _value(message: pb.GenerationRequest, name: str) -> Any:  # noqa: ANN401 - any field's
    field = message.DESCRIPTOR.fields_by_name[name]
    if field.has_presence and not message.HasField(name):  # type: ignore[arg-type]
        return GenerationRequest.model_fields[name].default
    value = getattr(message, name)
    return value if isinstance(value, str | int | float) else tuple(value)


_IN_RANGE: Final[Mapping[str, Callable[[Any], bool]]] = {
    "text": lambda text: 0 < len(text.encode()) <= LIMITS.max_text_bytes,
    "max_tokens": lambda number: 1 <= number <= LIMITS.context_tokens,
    "eos_token_ids": lambda ids: len(ids) <= 64 and all(token >= 0 for token in ids),
    "max_input_tokens": lambda number: number >= 0,
    "num_samples": lambda number: 1 <= number <= LIMITS.max_num_samples,
    "stop": lambda texts: len(texts) <= 16 and all(0 < len(text.encode()) <= 256 for text in texts),
    "temperature": lambda number: math.isfinite(number) and number >= 0,
    "top_k": lambda number: number >= 0,
    "top_p": lambda number: 0 < number <= 1,
    "presence_penalty": lambda number: -2 <= number <= 2,
    "frequency_penalty": lambda number: -2 <= number <= 2,
}
"""The ranges of the contract, written down a second time."""


def _is_in_range(name: str, value: Any) -> bool:  # noqa: ANN401 - any field's
    return _IN_RANGE[name](value)


def request_ids(data: bytes) -> None:
    """The id of a call is the one that was sent, where that is one, and a new one otherwise."""
    metadata = _metadata(data)
    found = CallMetadata.of(_context(metadata)).request_id
    sent = next((value for key, value in metadata if key == "x-request-id"), "")
    if isinstance(sent, str) and 1 <= len(sent) <= 128 and all(33 <= ord(character) <= 126 for character in sent):
        assert found == sent
    else:
        assert re.fullmatch("[0-9a-f]{32}", found)


_KEYS: Final = Authentication(KeyRing([API_KEY]), certificates=False)


def authorization(data: bytes) -> None:
    """Whoever sends the key, once and as a bearer, may call, and nobody else."""
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
    """A file of keys is refused with one line, or read, and then is the same when it is written and read again."""
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
    """Returns the metadata `key:value`, one a line, as grpc gives it to a servicer."""
    entries = (line.partition(b":") for line in data.split(b"\n"))
    return tuple((key.decode(errors="replace"), _decoded(key, value)) for key, _, value in entries)


def _decoded(key: bytes, value: bytes) -> str | bytes:
    return value if key.endswith(b"-bin") else value.decode(errors="replace")


@dataclass(frozen=True)
class _Context:
    """What is asked of the context of a call to find out who calls."""

    metadata: Metadata

    def invocation_metadata(self) -> Metadata:
        return self.metadata

    def auth_context(self) -> dict[str, list[bytes]]:
        return {}


def _context(metadata: Metadata) -> Any:  # noqa: ANN401 - passes for one of grpc's
    return _Context(metadata)


def _caller_with(metadata: Metadata) -> str:
    """Returns the name of who calls with this metadata."""
    context = _context(metadata)
    _KEYS.identify(context, CallMetadata.of(context))
    return caller.get().name


TARGETS: Final[Mapping[str, Callable[[bytes], None]]] = {
    "request": request,
    "request_ids": request_ids,
    "authorization": authorization,
    "keys_file": keys_file,
}

_FULL: Final = pb.GenerationRequest(
    text="hello 🦙",
    max_tokens=3,
    eos_token_ids=[1, 2],
    max_input_tokens=5,
    num_samples=2,
    stop=["a", "END"],
    temperature=0.5,
    top_k=0,
    top_p=0.5,
    presence_penalty=-2,
    frequency_penalty=2,
)
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
        _FULL.SerializeToString(),
        pb.GenerationRequest(text="x" * 201, max_tokens=-1, stop=[""] * 17, top_p=math.nan).SerializeToString(),
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
"""Inputs of each target to begin with."""
