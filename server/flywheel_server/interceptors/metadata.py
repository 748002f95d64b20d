"""Reads the metadata of a call."""

import re
import secrets
from typing import Final, NamedTuple

from flywheel_server.errors import MetadataTooLargeError
from flywheel_server.grpc_types import GrpcContext
from flywheel_server.interceptors.context import REQUEST_ID

AUTHORIZATION: Final = "authorization"

ENTRY_OVERHEAD_BYTES: Final = 32
"""Bytes that HTTP/2 counts for each entry beside its name and value (RFC 9113, section 6.5.2)."""

_VALID_REQUEST_ID: Final = re.compile(r"[\x21-\x7e]{1,128}")


class CallMetadata(NamedTuple):
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
    def of(cls, context: GrpcContext) -> "CallMetadata":
        """Returns the metadata of a call."""
        size = 0
        sent_id: str | bytes | None = None
        authorization: tuple[str | bytes, ...] = ()
        for name, value in context.invocation_metadata() or ():
            size += len(name) + len(value) + ENTRY_OVERHEAD_BYTES
            if name == AUTHORIZATION:
                authorization += (value,)
            elif name == REQUEST_ID and sent_id is None:
                sent_id = value
        own_id = sent_id if isinstance(sent_id, str) and _VALID_REQUEST_ID.fullmatch(sent_id) else secrets.token_hex(16)
        return cls(own_id, authorization, size)

    def check_size(self, limit: int) -> None:
        """Raises `MetadataTooLargeError` if there are more than `limit` bytes.

        gRPC holds a client to its limit only from when that client has acknowledged the server's HTTP/2 settings, which an
        attacker need not do. Until then gRPC takes in up to 16 MiB of metadata for each call, and keeps it until the call ends.
        """
        if self.size > limit:
            raise MetadataTooLargeError(limit)
