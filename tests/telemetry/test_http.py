"""The HTTP endpoint: what it answers, and what strangers cannot do to it."""

import asyncio
import gzip
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import pytest
from flywheel_server.telemetry import http
from flywheel_server.telemetry.http import MAX_CONNECTIONS, MAX_HEADER_BYTES, serving_http

from tests.serving import until
from tests.telemetry.scraping import exchange, get, parsed

GET = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"


class Source:
    """Makes texts, and counts them."""

    def __init__(self) -> None:
        self.text = b"up 1\n"
        self.made = 0
        self.may_go_on = asyncio.Event()
        self.may_go_on.set()

    async def render(self, openmetrics: bool) -> bytes:
        self.made += 1
        await self.may_go_on.wait()
        return self.text + (b"# EOF\n" if openmetrics else b"")

    async def page(self) -> str:
        return "<title>é</title>"


def connections() -> int:
    """Returns how many connections are being served."""
    return sum("_Connections.serve" in repr(task.get_coro()) for task in asyncio.all_tasks())


@asynccontextmanager
async def served(*, is_local: bool = True) -> AsyncIterator[tuple[Source, int]]:
    source = Source()
    async with serving_http("127.0.0.1:0", source.render, source.page, is_local=is_local) as port:
        yield source, port


async def test_the_format_follows_what_the_client_accepts() -> None:
    async with served() as (source, port):
        plain = await get(port)
        assert (plain.status, plain.content) == (200, source.text)
        assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")
        accept = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
        openmetrics = await get(port, Accept=accept)
        assert openmetrics.content == source.text + b"# EOF\n"
        assert openmetrics.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
        for accepted, expected in (
            ("application/openmetrics-text", True),
            ("text/plain, application/openmetrics-text; q=0.1", True),
            ("application/openmetrics-text;version=0.0.1;q=0,application/openmetrics-text;version=1.0.0;q=1.0", True),
            ("application/openmetrics-text;q=0,text/plain", False),
            ("text/plain;q=1, application/openmetrics-text; version=1.0.0; q=0.000", False),
            ("application/openmetrics-textual", False),
        ):
            answer = await get(port, Accept=accepted)
            assert answer.headers["content-type"].startswith("application/openmetrics-text") == expected, accepted
        for accepted, expected in (("gzip", True), ("br, gzip;q=0.5", True), ("gzip;q=0", False), ("identity", False)):
            answer = await get(port, **{"Accept-Encoding": accepted})
            assert (answer.headers.get("content-encoding") == "gzip") == expected
            assert (gzip.decompress(answer.content) if expected else answer.content) == source.text


async def test_paths_and_methods() -> None:
    async with served() as (source, port):
        page = await get(port, "/?x=1")
        assert (page.status, page.content.decode()) == (200, "<title>é</title>")
        assert "default-src 'none'" in page.headers["content-security-policy"]
        head = await get(port, method="HEAD")
        assert (head.status, head.content, head.headers["content-length"]) == (200, b"", str(len(source.text)))
        assert (await get(port, "/metrics/")).status == 404
        assert (await get(port, "/../etc/passwd")).status == 404
        refused = await exchange(port, b"POST /metrics HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\nabc")
        assert (refused.status, refused.headers["allow"]) == (405, "GET, HEAD")
        assert (await exchange(port, b"GET / HTTP/1.0\r\n\r\n")).status == 200


@pytest.mark.parametrize("host", ["localhost", "localhost:9464", "127.0.0.1:9464", "[::1]", "[::1]:9464", "10.0.0.1"])
async def test_names_of_this_machine_are_accepted(host: str) -> None:
    async with served() as (_, port):
        assert (await exchange(port, GET.replace(b"localhost", host.encode()))).status == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:9464", "localhost.evil.example", "[::1].evil.example", "é"])
async def test_a_web_page_cannot_read_a_local_endpoint_by_a_name_of_its_own(host: str) -> None:
    async with served() as (source, port):
        assert (await exchange(port, GET.replace(b"localhost", host.encode()))).status in {400, 403}
        assert not source.made
    async with served(is_local=False) as (_, port):
        assert (await exchange(port, GET.replace(b"localhost", b"server.example:9464"))).status == 200


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 404),
        (b"GET /metrics\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nHost : a\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nHost: a\r\nx: \x00\r\n\r\n", 400),
        (b"GET /" + b"x" * (2 * MAX_HEADER_BYTES), 431),
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * MAX_HEADER_BYTES, 431),
    ],
)
async def test_a_bad_request_is_refused(sent: bytes, status: int) -> None:
    async with served() as (source, port):
        assert (await exchange(port, sent)).status == status
        assert not source.made
        assert (await get(port)).status == 200


async def test_a_second_request_on_a_connection_is_not_answered() -> None:
    async with served() as (source, port):
        answer = await exchange(port, GET + GET)
        assert (answer.status, answer.content, answer.headers["connection"]) == (200, source.text, "close")
        assert source.made == 1


async def test_slow_requests_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "REQUEST_TIMEOUT", 0.2)
    async with served() as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with suppress(ConnectionError):
            for byte in GET[:-1]:
                writer.write(bytes([byte]))
                await asyncio.sleep(0.02)
        with suppress(ConnectionError):
            assert not await reader.read()
        writer.close()


async def test_an_answer_that_is_not_read_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "ANSWER_TIMEOUT", 0.2)
    async with served() as (source, port):
        source.text = b"x" * 20_000_000
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(GET)
            await until(lambda: connections() == 1, "it is connected")
            await until(lambda: connections() == 0, "the server gives it up")


async def test_silent_connections_do_not_keep_others_out() -> None:
    async with served() as (_, port), AsyncExitStack() as stack:
        silent = []
        for _ in range(3 * MAX_CONNECTIONS):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            stack.callback(writer.close)
            silent.append(reader)
        assert (await get(port)).status == 200
        with suppress(ConnectionError):
            assert not await silent[0].read(), "the oldest one was closed"


async def test_requests_that_come_together_share_a_text_and_further_ones_are_closed() -> None:
    async with served() as (source, port):
        source.may_go_on.clear()
        first = asyncio.create_task(get(port))
        await until(lambda: source.made == 1, "the first text is being made")
        others = [asyncio.create_task(get(port)) for _ in range(MAX_CONNECTIONS + 5)]
        # The places of the first request and of 15 others are taken by requests that await their text.
        await until(lambda: sum(task.done() for task in others) == 6, "there is no room for the rest")
        source.may_go_on.set()
        answers = [await task for task in (first, *others)]
        assert [answer.status for answer in answers].count(200) == MAX_CONNECTIONS
        assert source.made == 2
        assert (await get(port)).status == 200


async def test_a_text_that_cannot_be_made_is_an_error_of_the_server() -> None:
    async def fail(_: bool) -> bytes:
        raise RuntimeError("secret")

    async with serving_http("127.0.0.1:0", fail, Source().page, is_local=True) as port:
        answer = await get(port)
        assert answer.status == 500
        assert b"secret" not in answer.content


async def test_a_client_that_leaves_while_its_text_is_made_does_no_harm() -> None:
    async with served() as (source, port):
        source.may_go_on.clear()
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(GET)
        await until(lambda: source.made == 1, "it is being made")
        writer.transport.abort()
        source.may_go_on.set()
        assert (await get(port)).status == 200


async def test_the_server_stops_while_clients_are_connected() -> None:
    async with served() as (source, port):
        source.may_go_on.clear()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(GET)
        await until(lambda: source.made == 1, "it is being made")
    with suppress(ConnectionError):
        assert parsed(await reader.read()).status == 0
    writer.close()


async def test_a_port_that_is_taken_is_named() -> None:
    async with served() as (source, port):
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port} for metrics"):
            async with serving_http(f"127.0.0.1:{port}", source.render, source.page, is_local=True):
                pass
