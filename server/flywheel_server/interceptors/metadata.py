"""Reads the metadata of a call."""

import re
import secrets
from typing import Final, NamedTuple

from flywheel_server.errors import MetadataTooLargeError
from flywheel_server.grpc_types import Metadata
from flywheel_server.interceptors.context import REQUEST_ID

AUTHORIZATION: Final = "authorization"

ENTRY_OVERHEAD_BYTES: Final = 32
"""Bytes that HTTP/2 counts for each entry in addition to its name and value (RFC 9113, section 6.5.2)."""

_VALID_REQUEST_ID: Final = re.compile(r"[\x21-\x7e]{1,128}")


class CallMetadata(NamedTuple):
    """The metadata of a call that this server uses.

    Attributes:
        request_id: The caller's `x-request-id` if it is valid, else a new one.
        authorization: The values of all `authorization` entries.
        size: Bytes of all metadata, as HTTP/2 counts them, without entries that gRPC does not pass on, such as the path.
    """

    request_id: str
    authorization: tuple[str | bytes, ...]
    size: int

    @classmethod
    def of(cls, entries: Metadata) -> "CallMetadata":
        """Returns what this server uses of all metadata of a call."""
        size = 0
        sent_id: str | bytes | None = None
        authorization: tuple[str | bytes, ...] = ()
        for name, value in entries:
            size += len(name) + len(value) + ENTRY_OVERHEAD_BYTES
            if name == AUTHORIZATION:
                authorization += (value,)
            elif name == REQUEST_ID and sent_id is None:
                sent_id = value
        request_id = sent_id if isinstance(sent_id, str) and _VALID_REQUEST_ID.fullmatch(sent_id) else secrets.token_hex(16)
        return cls(request_id, authorization, size)

    def check_size(self, limit: int) -> None:
        """Raises `MetadataTooLargeError` if the metadata have more than `limit` bytes.

        gRPC enforces its own limit only after the client has acknowledged the server's HTTP/2 settings, which an attacker may
        never do. Until then gRPC accepts up to 16 MiB of metadata for each call, and keeps them until the call ends.
        """
        if self.size > limit:
            raise MetadataTooLargeError(limit)
