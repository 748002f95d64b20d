"""The page with the addresses, as an ASGI application."""

import asyncio
import json
from dataclasses import dataclass
from typing import Any

import pytest
from flywheel_server.deployment import page
from flywheel_server.deployment.page import Asgi, json_page


@dataclass
class Endpoint:
    address: str


async def ask(application: Asgi, method: str = "GET") -> tuple[int, bytes]:
    sent: list[Any] = []

    async def receive() -> Any:
        raise AssertionError("it needs no body")

    async def send(message: Any) -> None:
        sent.append(message)

    await application({"type": "http", "method": method, "path": "/"}, receive, send)
    start, body = sent
    assert dict(start["headers"])[b"content-type"] == b"application/json"
    return start["status"], body["body"]


async def test_it_says_what_is_read_and_reads_once_for_many(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = 0

    async def read() -> list[Endpoint]:
        nonlocal asked
        asked += 1
        return [Endpoint(f"host:{asked}")]

    application = json_page(read)
    for _ in range(3):
        status, body = await ask(application)
        assert (status, json.loads(body)) == (200, {"endpoints": [{"address": "host:1"}]})
    assert await ask(application, "HEAD") == (200, b"")
    monkeypatch.setattr(page, "CACHE_SECONDS", -1.0)
    monkeypatch.setattr(page, "MAX_AGE_SECONDS", -1.0)
    application = json_page(read)
    await ask(application)
    assert json.loads((await ask(application))[1]) == {"endpoints": [{"address": "host:3"}]}


async def test_what_cannot_be_read_is_503_and_only_for_now(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Any] = [RuntimeError("SECRET"), [Endpoint("host:1")]]

    async def read() -> list[Endpoint]:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return list(answer)

    application = json_page(read)
    for _ in range(2):
        status, body = await ask(application)
        assert (status, b"SECRET" in body) == (503, False)
    monkeypatch.setattr(page, "CACHE_SECONDS", -1.0)
    answers.insert(0, RuntimeError("SECRET"))
    application = json_page(read)
    assert [(await ask(application))[0] for _ in range(2)] == [503, 200]


async def test_many_callers_do_not_wait_for_a_slow_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Callers who come while it is read get the last answer, and a caller who leaves does not affect the others."""
    monkeypatch.setattr(page, "CACHE_SECONDS", -1.0)
    asked = 0
    go_on = asyncio.Event()

    async def read() -> list[Endpoint]:
        nonlocal asked
        asked += 1
        await go_on.wait()
        return [Endpoint(f"host:{asked}")]

    application = json_page(read)
    first = [asyncio.create_task(ask(application)) for _ in range(3)]
    await asyncio.sleep(0)
    first[0].cancel()
    go_on.set()
    answers = await asyncio.gather(*first, return_exceptions=True)
    assert isinstance(answers[0], asyncio.CancelledError)
    assert [answer[0] for answer in answers[1:] if isinstance(answer, tuple)] == [200, 200]
    go_on.clear()
    async with asyncio.timeout(5):
        for _ in range(200):
            status, body = await ask(application)
            assert (status, json.loads(body)) == (200, {"endpoints": [{"address": "host:1"}]})
            await asyncio.sleep(0)
    assert asked == 2
    go_on.set()


async def test_nothing_but_get() -> None:
    async def read() -> list[Endpoint]:
        raise AssertionError

    assert (await ask(json_page(read), "POST"))[0] == 405
