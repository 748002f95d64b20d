"""Refuses calls with too much metadata, where gRPC does not.

gRPC holds a client to `max_header_bytes` only from when that client has acknowledged the server's HTTP/2 settings, which an
attacker need not do. Until then gRPC takes in up to 16 MiB of metadata for each call, and keeps it until the call ends.
"""

from typing import Final

from flywheel_server.errors import MetadataTooLargeError
from flywheel_server.interceptors.base import Call, CallInterceptor, Context

ENTRY_OVERHEAD: Final = 32
"""Bytes that HTTP/2 counts for each entry beside its name and value (RFC 9113, section 6.5.2)."""


class MetadataInterceptor(CallInterceptor):
    """Raises `MetadataTooLargeError` for a call with more metadata than `limit` bytes.

    What gRPC keeps to itself, such as the path, is not counted, so a call that gRPC would let pass is let pass here.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit

    async def around(self, call: Call, context: Context) -> None:
        """Runs the call."""
        if sum(len(name) + len(value) + ENTRY_OVERHEAD for name, value in context.invocation_metadata() or ()) > self._limit:
            raise MetadataTooLargeError(self._limit)
        await call(context)
