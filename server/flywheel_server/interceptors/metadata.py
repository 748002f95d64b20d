"""Reads the metadata that a caller sent, and sends the metadata with which an answer begins."""

import asyncio
import re
import secrets
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final

from flywheel_server.errors import MetadataTooLargeError
from flywheel_server.interceptors.types import Context
from flywheel_server.operations import Operation

REQUEST_ID: Final = "x-request-id"
AUTHORIZATION: Final = "authorization"

ENTRY_OVERHEAD: Final = 32
"""Bytes that HTTP/2 counts for each entry beside its name and value (RFC 9113, section 6.5.2)."""

SENDING_TIMEOUT: Final = 1.0
"""Seconds that metadata or a status may take to be sent. A caller that reads nothing could hold the call for ever."""

_ACCEPTED: Final = re.compile(r"[\x21-\x7e]{1,128}")

request_id: ContextVar[str] = ContextVar("request_id")
"""The request id of the call that runs in this context."""


@dataclass(frozen=True, slots=True)
class CallMetadata:
    """What this server reads of the metadata of a call.

    Attributes:
        request_id: The caller's `x-request-id`, or a new one.
        authorization: The values that were sent as `authorization`.
        size: Bytes of all metadata, as HTTP/2 counts them. What gRPC keeps to itself, such as the path, is not counted.
    """

    request_id: str
    authorization: tuple[str | bytes, ...]
    size: int

    @classmethod
    def of(cls, context: Context) -> "CallMetadata":
        """Returns the metadata of a call."""
        size = 0
        sent_id: str | bytes | None = None
        authorization: tuple[str | bytes, ...] = ()
        for name, value in context.invocation_metadata() or ():
            size += len(name) + len(value) + ENTRY_OVERHEAD
            if name == AUTHORIZATION:
                authorization += (value,)
            elif name == REQUEST_ID and sent_id is None:
                sent_id = value
        own_id = sent_id if isinstance(sent_id, str) and _ACCEPTED.fullmatch(sent_id) else secrets.token_hex(16)
        return cls(own_id, authorization, size)

    def check_size(self, limit: int) -> None:
        """Raises `MetadataTooLargeError` if there are more than `limit` bytes.

        gRPC holds a client to its limit only from when that client has acknowledged the server's HTTP/2 settings, which an
        attacker need not do. Until then gRPC takes in up to 16 MiB of metadata for each call, and keeps it until the call ends.
        """
        if self.size > limit:
            raise MetadataTooLargeError(limit)


async def send_request_id(context: Context) -> None:
    """Sends the initial metadata, which hold the request id: the call has begun.

    Not before that: a call that is refused without any is one that gRPC's own retries, and those of proxies, may repeat.
    """
    sending = Operation(context.send_initial_metadata(((REQUEST_ID, request_id.get()),)))
    try:
        await sending.result
    except asyncio.CancelledError:
        # Only when they are sent does grpc note it. A status before that would send them again, which fails, and get lost.
        await asyncio.wait((sending.end(),), timeout=SENDING_TIMEOUT)
        raise
