"""Decompresses requests within a bound.

gRPC itself is told not to decompress (`flywheel_server.listening`): it would do so for callers that are not known yet, and some
versions of it compare the size with the limit only afterwards. gRPC then does not tell how a message is compressed, but the
message does: gzip (RFC 1952) begins with a byte that begins no protobuf message, and deflate, which has the format of zlib
(RFC 1950), has a header and a checksum.
"""

import asyncio
import zlib
from typing import Final

from flywheel_server.errors import RequestTooLargeError

_GZIP_OR_ZLIB: Final = zlib.MAX_WBITS | 32
_GZIP: Final = b"\x1f\x8b"
_ZLIB: Final = b"\x78"
_PIECE: Final = 2**16
"""Bytes that are decompressed before other calls get a turn."""


async def decompressed(data: bytes, limit: int) -> bytes:
    """Returns the message in `data`. Bytes that are not compressed with gzip or deflate are returned as they are.

    Raises:
        RequestTooLargeError: The message is larger than `limit` bytes.
    """
    if _looks_compressed(data):
        data = await _decompress(data, limit) or data
    if len(data) > limit:
        raise RequestTooLargeError(limit)
    return data


def _looks_compressed(data: bytes) -> bool:
    return data.startswith(_GZIP) or (data.startswith(_ZLIB) and int.from_bytes(data[:2]) % 31 == 0)


async def _decompress(data: bytes, limit: int) -> bytes | None:
    """Returns the message, of which at most `limit` + 1 bytes are made; None if the bytes only look compressed."""
    decompressor = zlib.decompressobj(_GZIP_OR_ZLIB)
    message = bytearray()
    start = 0
    try:
        while not decompressor.eof and len(message) <= limit:
            piece = decompressor.unconsumed_tail
            if not piece:
                piece = data[start : start + _PIECE]
                start += _PIECE
            if not piece:
                return None
            message += decompressor.decompress(piece, min(_PIECE, limit + 1 - len(message)))
            await asyncio.sleep(0)
    except zlib.error:
        return None
    return bytes(message)
