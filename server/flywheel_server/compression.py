"""Decompresses requests up to a maximum size.

gRPC is configured not to decompress (`flywheel_server.listening`): it would do so before authentication, and some versions
check the size only afterwards. Then gRPC does not report how a message is compressed, but the message itself shows it. gzip
(RFC 1952) begins with a byte that no protobuf message begins with. deflate, in the format of zlib (RFC 1950), has a header and
a checksum.
"""

import asyncio
import zlib
from typing import Final

from flywheel_server.errors import RequestTooLargeError

_GZIP_OR_ZLIB: Final = zlib.MAX_WBITS | 32
_GZIP: Final = b"\x1f\x8b"
_ZLIB: Final = b"\x78"
_CHUNK_BYTES: Final = 2**16
"""Bytes that are decompressed before the event loop serves other calls."""


async def decompressed(data: bytes, limit: int) -> bytes:
    """Returns the message in `data`, decompressed if it is compressed with gzip or deflate.

    Raises:
        RequestTooLargeError: The message is larger than `limit` bytes.
    """
    if _looks_compressed(data):
        message = await _decompress(data, limit)
        data = data if message is None else message
    if len(data) > limit:
        raise RequestTooLargeError(limit)
    return data


def _looks_compressed(data: bytes) -> bool:
    return data.startswith(_GZIP) or (data.startswith(_ZLIB) and int.from_bytes(data[:2]) % 31 == 0)


async def _decompress(data: bytes, limit: int) -> bytes | None:
    """Returns at most `limit` + 1 bytes of the message; None if the data only looks compressed."""
    decompressor = zlib.decompressobj(_GZIP_OR_ZLIB)
    message = bytearray()
    start = 0
    try:
        while not decompressor.eof and len(message) <= limit:
            chunk = decompressor.unconsumed_tail
            if not chunk:
                chunk = data[start : start + _CHUNK_BYTES]
                start += _CHUNK_BYTES
            if not chunk:
                return None
            message += decompressor.decompress(chunk, min(_CHUNK_BYTES, limit + 1 - len(message)))
            await asyncio.sleep(0)
    except zlib.error:
        return None
    if decompressor.eof and (decompressor.unused_data or start < len(data)):
        return None  # nothing may follow the compressed message
    return bytes(message)
