"""Fuzz targets: each takes any bytes, and raises if the server does not do with them what it promises.

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

from fuzz.ranges import lowest, ranges

LIMITS: Final = RequestLimits(max_text_bytes=200, max_num_samples=16, context_tokens=256)
API_KEY: Final = "fw_0123456789abcdef"
RANGES: Final = ranges(LIMITS)
METADATA_BYTES: Final = 8192
"""What gRPC clients take as metadata unless they say otherwise."""

Metadata = tuple[tuple[str, str | bytes], ...]


def verdict(
    data: bytes, kind: type[Message] = pb.GenerationRequest
) -> GenerationRequest | InvalidRequestError | MalformedRequestError | None:
    """Returns what the server makes of a request that arrives as these bytes: None if this kind of request has no fields."""
    try:
        message = kind.FromString(data)
        return request_from_proto(message, LIMITS) if isinstance(message, pb.GenerationRequest) else None
    except DecodeError:
        return MalformedRequestError()
    except InvalidRequestError as error:
        return error


def request(data: bytes) -> None:
    """Checks that a request arrives unchanged if all its fields are in range. If not, exactly the wrong fields are named."""
    found = verdict(data)
    if isinstance(found, MalformedRequestError):
        return
    message = pb.GenerationRequest.FromString(data)
    wrong = {name for name, its in RANGES.items() if _is_sent(message, name) and not its.accepts(getattr(message, name))}
    if isinstance(found, InvalidRequestError):
        named = [violation.field.partition("[")[0] for violation in found.violations]
        assert sorted(named) == sorted(wrong)
        status = status_of(found, "id")
        assert status.code is grpc.StatusCode.INVALID_ARGUMENT
        assert len(status.message.encode()) + sum(len(value) for _, value in status.trailing_metadata()) < METADATA_BYTES
    else:
        assert not wrong
        for name, field in GenerationRequest.model_fields.items():
            value = getattr(message, name) if _is_sent(message, name) else field.default
            assert getattr(found, name) == (value if isinstance(value, str | int | float | None) else tuple(value))


def _is_sent(message: pb.GenerationRequest, name: str) -> bool:
    """Returns whether the message has a value for the field. A field without presence always has one, if only zero."""
    return not message.DESCRIPTOR.fields_by_name[name].has_presence or message.HasField(name)  # type: ignore[arg-type]


def request_ids(data: bytes) -> None:
    """Checks that the id of a call is the id that was sent, if it is valid, and otherwise a new id."""
    metadata = _metadata(data)
    found = CallMetadata.of(_context(metadata)).request_id
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


@dataclass(frozen=True)
class _Context:
    """Has the part of a call's context that tells who calls."""

    metadata: Metadata

    def invocation_metadata(self) -> Metadata:
        return self.metadata

    def auth_context(self) -> dict[str, list[bytes]]:
        return {}


def _context(metadata: Metadata) -> Any:  # noqa: ANN401 - passes for one of grpc's
    return _Context(metadata)


def _caller_with(metadata: Metadata) -> str:
    """Returns the name of the caller that sends this metadata."""
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
    **lowest(RANGES)
    | {"text": "hello 🦙", "max_tokens": 3, "max_input_tokens": 5, "num_samples": 2, "stop": ["a", "END"], "top_p": 0.5}
)
"""Has each field."""
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
"""The first inputs of each target."""
