"""An HTTP/2 client that enforces no rule of the protocol: it sends frames exactly as a script makes them."""

import asyncio
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Self

from h2.errors import ErrorCodes
from hpack import Encoder, NeverIndexedHeaderTuple
from hyperframe.exceptions import HyperframeError
from hyperframe.frame import DataFrame, Frame, GoAwayFrame, HeadersFrame, RstStreamFrame, SettingsFrame

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
FRAME_HEADER_BYTES: Final = 9
SERVICE: Final = "/flywheel.v1.GenerationService/"


@dataclass
class Tally:
    """What was sent to a server, and how it answered."""

    connections: int = 0
    sent: int = 0
    answers: Counter[str] = field(default_factory=Counter)

    def add(self, other: Self) -> None:
        """Adds the counts of another tally."""
        self.connections += other.connections
        self.sent += other.sent
        self.answers.update(other.answers)


class Connection:
    """One connection. It counts in its tally what is sent and what comes back."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, tally: Tally) -> None:
        self.tally = tally
        self._reader = reader
        self._writer = writer
        self._next_stream = 1
        self._has_started = False

    def new_stream(self) -> int:
        """Returns the identifier of a stream that was not used before."""
        self._next_stream += 2
        return self._next_stream - 2

    async def start(self, settings: Mapping[int, int] | None = None) -> None:
        """Sends the bytes with which every connection begins."""
        self._has_started = True
        await self.send_bytes(PREFACE + SettingsFrame(0, settings=dict(settings or {})).serialize())

    async def send(self, frames: Iterable[Frame]) -> None:
        """Sends the frames, and waits while the server is slow to take them."""
        serialized = [frame.serialize() for frame in frames]
        await self.send_bytes(b"".join(serialized))
        self.tally.sent += len(serialized)

    async def send_bytes(self, data: bytes) -> None:
        """Sends bytes, which are not counted."""
        self._writer.write(data)
        await self._writer.drain()
        await asyncio.sleep(0)  # a drain without a wait lets no other task read

    async def read(self) -> None:
        """Reads and counts frames until the server closes the connection."""
        while True:
            try:
                frame, length = Frame.parse_frame_header(memoryview(await self._reader.readexactly(FRAME_HEADER_BYTES)))
                frame.parse_body(memoryview(await self._reader.readexactly(length)))
            except (asyncio.IncompleteReadError, ConnectionError):
                self.tally.answers["closed"] += 1
                return
            except HyperframeError:
                self.tally.answers["unreadable"] += 1
                return
            self.tally.answers[_name(frame)] += 1
            if self._has_started and isinstance(frame, SettingsFrame) and "ACK" not in frame.flags:
                self._writer.write(SettingsFrame(0, flags=["ACK"]).serialize())

    def close(self) -> None:
        """Drops the connection."""
        self._writer.transport.abort()


def _name(frame: Frame) -> str:
    name = {GoAwayFrame: "GOAWAY", RstStreamFrame: "RST_STREAM"}.get(type(frame))
    if name is None:
        return type(frame).__name__.removesuffix("Frame")
    code: int = frame.error_code  # type: ignore[attr-defined]
    return f"{name} {ErrorCodes(code).name if code in set(ErrorCodes) else code}"


def header_block(method: str, *more: tuple[str, str | bytes], service: str = SERVICE) -> bytes:
    """Returns the headers of a call, compressed without the dynamic table, so that they are the same on every connection."""
    headers = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", service + method),
        (":authority", "localhost"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        *more,
    ]
    return Encoder().encode([NeverIndexedHeaderTuple(name, value) for name, value in headers], huffman=False)


def call(stream: int, block: bytes, message: bytes) -> list[Frame]:
    """Returns the frames of a whole call."""
    return [HeadersFrame(stream, block, flags=["END_HEADERS"]), DataFrame(stream, prefixed(message), flags=["END_STREAM"])]


def prefixed(message: bytes, *, is_compressed: bool = False) -> bytes:
    """Returns the message as gRPC sends it: after a byte that tells whether it is compressed, and its length."""
    return bytes([is_compressed]) + len(message).to_bytes(4) + message
