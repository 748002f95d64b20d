"""Checks the metadata of a client when the client is made.

grpc checks metadata only when a call begins, and its errors differ between threads and asyncio, and do not name the metadata.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Final

Metadata = tuple[tuple[str, str | bytes], ...]

# The format is that of https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md
_KEY: Final = re.compile(r"[0-9a-z_.-]+", re.ASCII)
_TEXT: Final = re.compile(r"[ -~]*", re.ASCII)
_RESERVED_PREFIX: Final = "grpc-"
_BINARY_SUFFIX: Final = "-bin"
_PAIR_LENGTH: Final = 2
# Headers that gRPC sends itself, or that RFC 9113, section 8.2.2, forbids: servers and proxies refuse calls with such headers.
_TRANSPORT_HEADERS: Final = frozenset(
    {
        "connection",
        "content-length",
        "content-type",
        "host",
        "keep-alive",
        "proxy-connection",
        "te",
        "transfer-encoding",
        "upgrade",
    }
)


def checked_metadata(metadata: Iterable[Sequence[str | bytes]]) -> Metadata:
    """Returns the metadata; raises `TypeError` or `ValueError`, with the key, if gRPC does not allow them."""
    if isinstance(metadata, str | bytes) or not isinstance(metadata, Iterable):
        raise TypeError("metadata must be a sequence of pairs of key and value")
    return tuple(_checked(entry) for entry in metadata)


def _checked(entry: Sequence[str | bytes]) -> tuple[str, str | bytes]:
    if isinstance(entry, str | bytes) or not isinstance(entry, Sequence) or len(entry) != _PAIR_LENGTH:
        raise TypeError("metadata must be pairs of key and value")
    key, value = entry
    if not isinstance(key, str):
        raise TypeError(f"metadata key {key!r} must be a str")
    if not _KEY.fullmatch(key):
        raise ValueError(f"metadata key {key!r} must be one or more lowercase letters, digits, and characters of _.-")
    if key.startswith(_RESERVED_PREFIX) or key in _TRANSPORT_HEADERS:
        raise ValueError(f"metadata key {key!r} is reserved for gRPC and HTTP/2 themselves")
    if key.endswith(_BINARY_SUFFIX):
        if not isinstance(value, bytes):
            raise TypeError(f"metadata {key!r} must have a value of bytes, because its key ends with {_BINARY_SUFFIX}")
    elif not isinstance(value, str):
        raise TypeError(f"metadata {key!r} must have a str for a value; for bytes the key must end with {_BINARY_SUFFIX}")
    elif not _TEXT.fullmatch(value) or value != value.strip(" "):
        # The message does not show the value, which may be a secret: messages end up in logs.
        raise ValueError(
            f"metadata {key!r} must have a value of printable ASCII without spaces around it, or a key with {_BINARY_SUFFIX}"
        )
    return key, value
