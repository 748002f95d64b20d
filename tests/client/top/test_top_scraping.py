"""What answers in the place of metrics is not trusted: a scrape ends in bounded time and memory, with a reason."""

from __future__ import annotations

import asyncio

import pytest
from flywheel_client._top import scraping
from flywheel_client._top.scraping import MAX_ANSWER_BYTES, ScrapeError, host_and_port, scrape

from tests.client.top.fake_metrics import fake_metrics, raw
from tests.serving import free_ports
from tests.thorough import further

OK = b"HTTP/1.1 200 OK\r\n"


async def reason_of(answer: bytes) -> str:
    async with fake_metrics() as fake:
        fake.answer = raw(answer)
        with pytest.raises(ScrapeError) as error:
            await scrape(fake.address)
        return str(error.value)


NOT_HTTP = "does not speak HTTP/1.1"
TOO_MANY = "too many parts"
TOO_LARGE = "larger than 4 MiB"

ANSWERS = {
    "nothing": (b"", "hung up without an answer"),
    "not found": (b"HTTP/1.1 404 Not Found\r\n\r\n", "HTTP status 404"),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", NOT_HTTP),
    "cut off": (OK + b"Content-Length: 1000\r\n\r\nflywheel", NOT_HTTP),
    "a long header": (OK + b"A: " + b"x" * 10**6, NOT_HTTP),
    "a long body": (OK + b"\r\n" + b"x" * (MAX_ANSWER_BYTES + 1), TOO_LARGE),
}
FURTHER_ANSWERS = {
    "a redirect": (b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\n\r\n", "HTTP status 302"),
    "many chunks": (OK + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * (MAX_ANSWER_BYTES // 6), TOO_MANY),
    "many interim answers": (b"HTTP/1.1 100 Continue\r\n\r\n" * (MAX_ANSWER_BYTES // 25), TOO_MANY),
    "bytes": (b"\x00\xff" * 100, NOT_HTTP),
}


@pytest.mark.parametrize("name", [*ANSWERS, *further(FURTHER_ANSWERS)])
async def test_an_answer_without_metrics_has_a_reason(name: str) -> None:
    answer, reason = (ANSWERS | FURTHER_ANSWERS)[name]
    assert reason in await reason_of(answer)


async def test_chunks_and_interim_answers_are_read() -> None:
    async with fake_metrics() as fake:
        fake.answer = raw(
            b"HTTP/1.1 103 Early Hints\r\n\r\n" + OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n"
        )
        assert await scrape(fake.address) == b"abc"
        (request,) = fake.requests
        assert request.startswith(b"GET /metrics HTTP/1.1\r\n")
        assert f"Host: {fake.address}\r\n".encode() in request


async def test_a_server_that_sends_a_byte_now_and_then_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scraping, "SCRAPE_TIMEOUT", 0.2)

    async def drip(writer: asyncio.StreamWriter) -> None:
        while True:
            await raw(b"H")(writer)
            await asyncio.sleep(0.01)

    async with fake_metrics() as fake:
        fake.answer = drip
        with pytest.raises(ScrapeError, match=r"not within 0\.2 s"):
            await scrape(fake.address)


async def test_where_nothing_listens_the_system_says_so() -> None:
    with pytest.raises(ScrapeError, match=r"^Connection refused$"):
        await scrape(f"127.0.0.1:{free_ports(1)[0]}")


@pytest.mark.parametrize(
    "address",
    ["localhost", "localhost:0", *further(["localhost:65536", ":1", "a b:1", "::1:9", "h:\u0663", "http://h:1", "h:1/x"])],
)
def test_an_address_is_a_host_and_a_port(address: str) -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        host_and_port(address)


def test_an_address_may_be_of_ipv6() -> None:
    assert host_and_port("[::1]:9464") == ("::1", 9464)
