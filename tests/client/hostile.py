"""A server that breaks the rules of gRPC, and sends what a test tells it to."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import RequestReceived, StreamEnded, StreamReset, WindowUpdated
from h2.exceptions import ProtocolError

from tests.server.http2_client import prefixed

if TYPE_CHECKING:
    from h2.errors import ErrorCodes
    from h2.events import Event

FRAME = 16_384
HEADERS = ((":status", "200"), ("content-type", "application/grpc"))
OK = (("grpc-status", "0"),)


@dataclass(frozen=True)
class Headers:
    """Headers, or trailers if `end` is set."""

    fields: tuple[tuple[str, str | bytes], ...]
    end: bool = False


@dataclass(frozen=True)
class Reset:
    """The stream's end by RST_STREAM."""

    code: ErrorCodes


@dataclass(frozen=True)
class GoAway:
    """The connection's end by GOAWAY, and a closed socket."""

    code: ErrorCodes


Step = Headers | Reset | GoAway | bytes
Answer = Callable[[str], Iterable[Step]]
"""What to send to a call of a method, by its path."""


def trailers(*fields: tuple[str, str | bytes]) -> Headers:
    """Returns the end of a call."""
    return Headers(fields, end=True)


def answer(*messages: bytes, ends: tuple[tuple[str, str | bytes], ...] = OK) -> list[Step]:
    """Returns what a server sends for a call with these messages and then this status."""
    return [Headers(HEADERS), *map(prefixed, messages), trailers(*ends)]


class HostileServer:
    """Speaks correct HTTP/2, and sends in it whatever `answers` says."""

    def __init__(self) -> None:
        self.answers: Answer = lambda _: answer()
        self.resets = threading.Semaphore(0)
        """Released for each call that its client has cancelled."""
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]

    @property
    def address(self) -> str:
        """The address of this server."""
        return "{}:{}".format(*self._listening.getsockname())

    @contextmanager
    def serving(self) -> Iterator[HostileServer]:
        """Serves until the end of the block."""
        self._threads[0].start()
        try:
            yield self
        finally:
            # Closing alone does not end `accept`.
            for each in (self._listening, *self._open):
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
                each.close()
            for thread in self._threads:
                thread.join()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                accepted, _ = self._listening.accept()
                self._open.append(accepted)
                thread = threading.Thread(target=_Connection(self, accepted).run)
                self._threads.append(thread)
                thread.start()


class _Connection:
    def __init__(self, server: HostileServer, connected: socket.socket) -> None:
        self._server = server
        self._socket = connected
        self._http2 = H2Connection(H2Configuration(client_side=False, header_encoding="utf-8", validate_outbound_headers=False))
        self._paths: dict[int, str] = {}
        self._unsent: dict[int, Iterator[Step]] = {}
        self._data: dict[int, bytes] = {}

    def run(self) -> None:
        with suppress(OSError, ProtocolError), self._socket:
            self._http2.initiate_connection()
            self._flush()
            while received := self._socket.recv(FRAME):
                for event in self._http2.receive_data(received):
                    self._note(event)
                for stream in list(self._unsent):
                    self._send(stream)
                self._flush()

    def _note(self, event: Event) -> None:
        match event:
            case RequestReceived():
                self._paths[event.stream_id] = {str(key): str(value) for key, value in event.headers}[":path"]
            case StreamEnded():
                self._unsent[event.stream_id] = iter(self._server.answers(self._paths.pop(event.stream_id)))
            case StreamReset():
                self._unsent.pop(event.stream_id, None)
                self._server.resets.release()
            case WindowUpdated():
                pass

    def _send(self, stream: int) -> None:
        """Sends as much as the client takes now."""
        while True:
            data = self._data.pop(stream, b"")
            while data:
                size = min(self._http2.local_flow_control_window(stream), FRAME, len(data))
                if not size:
                    self._data[stream] = data
                    return
                self._http2.send_data(stream, data[:size])
                data = data[size:]
                self._flush()
            match next(self._unsent[stream], None):
                case None:
                    del self._unsent[stream]
                    return
                case bytes(data):
                    self._data[stream] = data
                case Headers(fields, end):
                    self._http2.send_headers(stream, fields, end_stream=end)
                case Reset(code):
                    self._http2.reset_stream(stream, code)
                case GoAway(code):
                    self._http2.close_connection(code)
                    self._flush()
                    self._socket.shutdown(socket.SHUT_WR)

    def _flush(self) -> None:
        self._socket.sendall(self._http2.data_to_send())
