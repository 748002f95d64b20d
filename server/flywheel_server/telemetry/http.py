"""Serves metrics and a page about the server over HTTP/1.1, within small limits, because anybody may call it.

There is one request for each connection. So a client can neither keep a connection nor hide a request behind another one.
"""

import asyncio
import gzip
import ipaddress
import re
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

import h11
import structlog

log = structlog.stdlib.get_logger(__name__)

MAX_CONNECTIONS: Final = 16
"""Connections at a time. A further one closes the oldest connection that waits for its client."""

MAX_HEADER_BYTES: Final = 8192
"""The largest request line and headers together."""

REQUEST_TIMEOUT: Final = 5.0
"""Seconds within which a request must arrive."""

ANSWER_TIMEOUT: Final = 20.0
"""Seconds within which an answer must be made and read."""

CLOSE_TIMEOUT: Final = 1.0
"""Seconds in which a client may close a connection after its answer. A close by the server could destroy the answer."""

MAX_DISCARDED_BYTES: Final = 2**16
"""Bytes that a client may still send after its request, such as a body, and that are discarded."""

PAUSE_FACTOR: Final = 9
"""After a text, the next one waits for this many times as long as the last one took: texts take a tenth of the time at most."""

MAX_PAUSE: Final = 0.5
"""Seconds that it waits at most."""

TEXT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS_TYPE: Final = "application/openmetrics-text; version=1.0.0; charset=utf-8"

Render = Callable[[bool], Awaitable[bytes]]
"""Returns all metrics: in OpenMetrics if the argument is true, otherwise in Prometheus' text format."""

Refresh = Callable[[], Awaitable[None]]
"""Finds out what takes time to find out, before metrics or a page are made. It mostly waits, so it may take long."""

Page = Callable[[], Awaitable[str]]
"""Returns the page about the server, as HTML."""


@dataclass(frozen=True, slots=True)
class _Answer:
    status: HTTPStatus
    content_type: str
    content: bytes
    headers: tuple[tuple[str, str], ...] = ()


@asynccontextmanager
async def serving_http(
    address: str, render: Render, page: Page, *, is_local: bool, refresh: Refresh | None = None
) -> AsyncIterator[int]:
    """Serves `/metrics` and `/` for the length of the context, which gets the port.

    Arguments:
        address: HOST:PORT to listen on; port 0 is any free port.
        render: Returns the metrics.
        page: Returns the page at `/`.
        is_local: Whether only this machine can reach the address. Then the `Host` of a request must be `localhost` or an IP
            address. Otherwise a web page in a browser on this machine could read the answers, if the name of its own host leads
            here (DNS rebinding).
        refresh: Awaited before `render` and `page`, if given.

    Raises:
        OSError: The server cannot listen there.
    """
    host, _, port = address.rpartition(":")
    connections = _Connections(_Pages(render, page, refresh, is_local=is_local))
    try:
        server = await asyncio.start_server(connections.serve, host.strip("[]"), int(port), limit=MAX_HEADER_BYTES)
    except OSError as error:
        raise OSError(f"cannot listen on {address} for metrics: {error.strerror or error}") from error
    try:
        _limit_unread_answers(server)
        bound = int(server.sockets[0].getsockname()[1])
        log.info("metrics", url=f"http://{host}:{bound}/metrics")
        yield bound
    finally:
        server.close()
        await connections.close()


def _limit_unread_answers(server: asyncio.Server) -> None:
    """Makes the system drop an answer that its client does not read, even after the connection was closed.

    Otherwise the system would keep each such answer for many minutes. Connections inherit the option. Only Linux has it.
    """
    if sys.platform == "linux":
        for listening in server.sockets:
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(ANSWER_TIMEOUT * 1000))


class _Pages:
    """Answers requests. Requests that come at the same time get the same text, which is made after all of them came."""

    def __init__(self, render: Render, page: Page, refresh: Refresh | None, *, is_local: bool) -> None:
        self._is_local = is_local
        self._refresh = refresh
        self._render = render
        self._page = page
        self._waiting: dict[tuple[str, bool, bool], asyncio.Task[_Answer]] = {}
        """Texts that are still to be made."""
        self._making: set[asyncio.Task[_Answer]] = set()
        self._one_at_a_time = asyncio.Lock()
        self._next_at = 0.0

    async def answer(self, request: h11.Request) -> _Answer:
        """Returns the answer to a request."""
        headers = {name: value.decode("ascii", "replace").lower() for name, value in request.headers}
        if self._is_local and not _names_this_machine(headers.get(b"host", "")):
            return _problem(HTTPStatus.FORBIDDEN, "Use localhost or an IP address in the URL.")
        path = request.target.partition(b"?")[0].decode("ascii", "replace")
        if path not in {"/", "/metrics"}:
            return _problem(HTTPStatus.NOT_FOUND, "There are /metrics and / here.")
        if request.method not in {b"GET", b"HEAD"}:
            return _problem(HTTPStatus.METHOD_NOT_ALLOWED, "Use GET.", (("allow", "GET, HEAD"),))
        openmetrics = path == "/metrics" and _accepts(headers.get(b"accept", ""), "application/openmetrics-text")
        key = path, openmetrics, _accepts(headers.get(b"accept-encoding", ""), "gzip")
        task = self._waiting.get(key)
        if task is None:
            task = self._waiting[key] = asyncio.create_task(self._make(key))
            self._making.add(task)
            task.add_done_callback(self._making.discard)
        return await asyncio.shield(task)

    async def close(self) -> None:
        """Ends all work."""
        for task in self._making:
            task.cancel()
        await asyncio.gather(*self._making, return_exceptions=True)

    async def _make(self, key: tuple[str, bool, bool]) -> _Answer:
        loop = asyncio.get_running_loop()
        path, openmetrics, compresses = key
        async with self._one_at_a_time:
            await asyncio.sleep(self._next_at - loop.time())
            del self._waiting[key]
            started_at = loop.time()
            try:
                if self._refresh:
                    await self._refresh()
                started_at = loop.time()
                content, content_type = await self._content(path, openmetrics=openmetrics)
                if compresses:
                    # In a thread, because zlib lets the event loop run meanwhile.
                    content = await asyncio.to_thread(gzip.compress, content, 1)
            except Exception:
                log.exception("page not made", path=path)
                return _problem(HTTPStatus.INTERNAL_SERVER_ERROR, "The page could not be made. The server's log has the cause.")
            finally:
                now = loop.time()
                self._next_at = now + min(PAUSE_FACTOR * (now - started_at), MAX_PAUSE)
        headers = (("vary", "Accept, Accept-Encoding"), *((("content-encoding", "gzip"),) if compresses else ()))
        return _Answer(HTTPStatus.OK, content_type, content, headers)

    async def _content(self, path: str, *, openmetrics: bool) -> tuple[bytes, str]:
        if path == "/":
            return (await self._page()).encode(errors="replace"), "text/html; charset=utf-8"
        return await self._render(openmetrics), OPENMETRICS_TYPE if openmetrics else TEXT_TYPE


def _names_this_machine(host: str) -> bool:
    """Returns whether a `Host` is `localhost` or an IP address, with or without a port. HTTP/1.0 needs none."""
    name = host.rpartition(":")[0] if re.search(r":\d*$", host) and not host.endswith("]") else host
    try:
        return name in {"", "localhost"} or bool(ipaddress.ip_address(name.strip("[]")))
    except ValueError:
        return False


def _accepts(header: str, name: str) -> bool:
    """Returns whether an `Accept` or `Accept-Encoding` in lower case names this, without a weight of 0 (RFC 9110, 12.4.2)."""
    for each in header.replace(" ", "").split(","):
        accepted, *parameters = each.split(";")
        if accepted == name and not any(re.fullmatch(r"q=[0.]*", parameter) for parameter in parameters):
            return True
    return False


def _problem(status: HTTPStatus, text: str, headers: tuple[tuple[str, str], ...] = ()) -> _Answer:
    """Returns an answer that says in a line why there is no other."""
    return _Answer(status, "text/plain; charset=utf-8", f"{text}\n".encode(), headers)


class _Connections:
    """Serves connections, at most `MAX_CONNECTIONS` at a time."""

    def __init__(self, pages: _Pages) -> None:
        self._pages = pages
        self._tasks: dict[asyncio.Task[None], None] = {}
        """The task of each connection, the oldest first."""
        self._working: set[asyncio.Task[None]] = set()
        """The tasks that await their answer."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serves a connection."""
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a coroutine runs in one
        try:
            if self._has_room():
                self._tasks[task] = None
                await self._serve(task, reader, writer)
        except (OSError, TimeoutError, asyncio.CancelledError):
            # The client has gone or is too slow, or another connection takes its place. The task belongs to this class, so
            # nobody else waits for its cancellation.
            pass
        finally:
            self._tasks.pop(task, None)
            self._working.discard(task)
            writer.transport.abort()

    async def close(self) -> None:
        """Ends all connections."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._pages.close()

    def _has_room(self) -> bool:
        """Returns whether a further connection can be served, if need be in the place of the oldest one."""
        if len(self._tasks) < MAX_CONNECTIONS:
            return True
        oldest = next((task for task in self._tasks if task not in self._working), None)
        if oldest is None:
            return False
        del self._tasks[oldest]
        oldest.cancel()
        return True

    async def _serve(self, task: asyncio.Task[None], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # So that `drain` returns when the system has taken everything.
        writer.transport.set_write_buffer_limits(0)
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEADER_BYTES)
        is_head = False
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT):
                request = await _receive(connection, reader)
            if request is None:
                return
            is_head = request.method == b"HEAD"
            async with asyncio.timeout(ANSWER_TIMEOUT):
                self._working.add(task)
                answer = await self._pages.answer(request)
                self._working.discard(task)
        except h11.RemoteProtocolError as error:
            answer = _problem(HTTPStatus(error.error_status_hint), f"This is no request: {error}.")
        async with asyncio.timeout(ANSWER_TIMEOUT):
            writer.write(_sent(connection, answer, is_head=is_head))
            await writer.drain()
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT):
                if not writer.transport.is_closing():
                    writer.write_eof()
                    await _discard(reader)


async def _receive(connection: h11.Connection, reader: asyncio.StreamReader) -> h11.Request | None:
    """Returns the request without its body; None if the client closes the connection. Raises `h11.RemoteProtocolError`."""
    while (event := connection.next_event()) is h11.NEED_DATA:
        connection.receive_data(await reader.read(MAX_HEADER_BYTES))
    return event if isinstance(event, h11.Request) else None


async def _discard(reader: asyncio.StreamReader) -> None:
    discarded = 0
    while discarded < MAX_DISCARDED_BYTES and (data := await reader.read(MAX_HEADER_BYTES)):
        discarded += len(data)


def _sent(connection: h11.Connection, answer: _Answer, *, is_head: bool) -> bytes:
    """Returns the bytes of an answer; without its content if the method of the request is HEAD."""
    headers = [
        ("content-type", answer.content_type),
        ("content-length", str(len(answer.content))),
        ("cache-control", "no-store"),
        # A browser runs and loads nothing for the page, and shows it in no other page.
        ("content-security-policy", "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"),
        ("x-content-type-options", "nosniff"),
        ("connection", "close"),
        *answer.headers,
    ]
    response = h11.Response(status_code=answer.status, reason=answer.status.phrase, headers=headers)
    return (connection.send(response) or b"") + (b"" if is_head else answer.content)
