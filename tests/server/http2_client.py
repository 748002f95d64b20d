"""A client that may leave its calls unfinished, which gRPC's own clients do not."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import DataReceived, ResponseReceived, StreamEnded, StreamReset, TrailersReceived
from h2.exceptions import ProtocolError, StreamClosedError
from h2.settings import SettingCodes


def prefixed(message: bytes, *, compressed: bool = False, length: int | None = None) -> bytes:
    """Returns the message as gRPC sends it, or the beginning of one with another length."""
    return bytes([compressed]) + (len(message) if length is None else length).to_bytes(4) + message


class Stream:
    """A call, and its answer so far."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.headers: dict[str, str] = {}
        self.data = b""
        self.ended = asyncio.Event()

    async def status(self) -> int:
        """Returns the gRPC status that the call ended with."""
        await asyncio.wait_for(self.ended.wait(), 30)
        return int(self.headers.get("grpc-status", -1))


class Client:
    """A connection that keeps the rules of HTTP/2."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, window: int | None) -> None:
        self._reader = reader
        self._writer = writer
        self._window_changed = asyncio.Event()
        self._streams: dict[int, Stream] = {}
        self._http2 = H2Connection()
        if window is not None:
            self._http2.local_settings[SettingCodes.INITIAL_WINDOW_SIZE] = window
            self._http2.local_settings.acknowledge()
        self._http2.initiate_connection()
        self._flush()

    def begin(self, path: str, *headers: tuple[str, str]) -> Stream:
        """Begins a call."""
        stream = Stream(self._http2.get_next_available_stream_id())
        own = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "localhost"), ("te", "trailers")]
        self._http2.send_headers(stream.number, [*own, ("content-type", "application/grpc"), *headers])
        self._streams[stream.number] = stream
        self._flush()
        return stream

    def reset(self, stream: Stream) -> None:
        """Cancels a call."""
        self._http2.reset_stream(stream.number, ErrorCodes.CANCEL)
        self._flush()

    async def send(self, stream: Stream, data: bytes, *, end: bool = False) -> int:
        """Sends bytes as the server takes them, until the call ends; returns how many the server took."""
        sent = 0
        try:
            while sent < len(data) and not stream.ended.is_set():
                size = min(self._http2.local_flow_control_window(stream.number), 16_384, len(data) - sent)
                if not size:
                    self._window_changed.clear()
                    waiting = [asyncio.ensure_future(event.wait()) for event in (self._window_changed, stream.ended)]
                    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                    continue
                self._http2.send_data(stream.number, data[sent : sent + size])
                self._flush()
                sent += size
                await self._writer.drain()
                await asyncio.sleep(0)
            if end:
                self._http2.end_stream(stream.number)
                self._flush()
        except (StreamClosedError, ProtocolError):
            pass  # the server has ended the call meanwhile
        return sent

    async def call(self, path: str, data: bytes, *headers: tuple[str, str], end: bool = True) -> int:
        """Makes a call; returns the gRPC status that it ended with."""
        stream = self.begin(path, *headers)
        await self.send(stream, data, end=end)
        return await stream.status()

    async def read(self) -> None:
        """Takes in what the server sends, until the connection ends."""
        while data := await self._reader.read(2**16):
            for event in self._http2.receive_data(data):
                self._take(event)
            self._window_changed.set()
            self._flush()

    def _take(self, event: Any) -> None:
        stream = self._streams.get(getattr(event, "stream_id", 0))
        if stream is None:
            return
        if isinstance(event, ResponseReceived | TrailersReceived):
            stream.headers |= {_text(name): _text(value) for name, value in event.headers or ()}
        elif isinstance(event, DataReceived):
            stream.data += event.data or b""
            self._http2.acknowledge_received_data(event.flow_controlled_length or 0, stream.number)
        elif isinstance(event, StreamEnded | StreamReset):
            stream.ended.set()

    def _flush(self) -> None:
        self._writer.write(self._http2.data_to_send())

    def close(self) -> None:
        """Drops the connection."""
        self._writer.transport.abort()


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


@asynccontextmanager
async def http2(address: str, *, window: int | None = None) -> AsyncIterator[Client]:
    """Gives a connection of its own to the address, which grants `window` bytes to the answers of each call."""
    host, _, port = address.rpartition(":")
    client = Client(*await asyncio.open_connection(host, int(port)), window=window)
    reading = asyncio.create_task(client.read())
    try:
        yield client
    finally:
        client.close()
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
