"""Reads the messages of a server, so that both clients raise the same error for an unreadable answer.

Without this, grpc ends such a call with INTERNAL but leaves it open on the wire, and grpc.aio returns None as its answer.
"""

from collections.abc import Callable
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError

from flywheel_client._errors import InternalError

_UNREADABLE: Final = object()


def marking_unreadable(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Returns a deserializer that returns a mark for unreadable bytes, instead of raising; `require_message` looks for it."""

    def read(data: bytes) -> Any:  # noqa: ANN401 - a message of the method, or the mark
        try:
            return deserialize(data)
        except (DecodeError, ValueError):
            # Protobuf in pure Python raises UnicodeDecodeError, a ValueError, if a text is not UTF-8.
            return _UNREADABLE

    return read


def require_message(message: Any, request_id: str) -> Any:  # noqa: ANN401 - a message of the method
    """Returns the message; raises `InternalError` if it is unreadable, or if the call ended with OK but without a message."""
    if message is _UNREADABLE:
        raise InternalError(grpc.StatusCode.INTERNAL, "the server's answer is no message of this method", request_id=request_id)
    if message is None:
        raise InternalError(grpc.StatusCode.INTERNAL, "the server ended the call without an answer", request_id=request_id)
    return message
