"""Publishes the addresses of the gateways as JSON, in an ASGI application, for callers without an account on Modal."""

import asyncio
import dataclasses
import json
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from http import HTTPStatus
from math import inf
from typing import Any, Final

import structlog

log = structlog.stdlib.get_logger(__name__)

CACHE_SECONDS: Final = 5.0
"""Seconds for which an answer is reused, so that many callers cost one read of the directory."""

MAX_AGE_SECONDS: Final = 15.0
"""Maximum age of an answer that callers get while the directory is being read, which may take 8 s."""

# The types of ASGI: what an application is called with, and the application.
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Asgi = Callable[[Message, Receive, Send], Awaitable[None]]


def json_page(read: Callable[[], Awaitable[Iterable[Any]]]) -> Asgi:
    """Returns an application that answers every GET with `{"endpoints": […]}`.

    Arguments:
        read: Returns the endpoints, as dataclasses. If it fails, the answer is 503.
    """
    reading: asyncio.Task[None] | None = None
    cached: tuple[int, bytes] = (503, b"")
    cached_at = -inf

    async def refresh() -> None:
        nonlocal cached, cached_at
        try:
            endpoints = [dataclasses.asdict(endpoint) for endpoint in await read()]
            cached = 200, json.dumps({"endpoints": endpoints}).encode()
        except Exception as error:  # noqa: BLE001 - whatever fails, the page answers 503
            log.warning("addresses not read", error=str(error))
            cached = 503, b'{"error": "Modal does not say where the gateways are. Try again later."}'
        cached_at = time.monotonic()

    async def answer() -> tuple[int, bytes]:
        nonlocal reading
        age = time.monotonic() - cached_at
        if age > CACHE_SECONDS:
            if reading is None or reading.done():
                reading = asyncio.create_task(refresh())
            if cached[0] != HTTPStatus.OK or age > MAX_AGE_SECONDS:
                await asyncio.shield(reading)  # other callers may wait for the same task
        return cached

    async def application(scope: Message, receive: Receive, send: Send) -> None:  # noqa: ARG001 - ASGI passes `receive`
        if scope["type"] != "http":
            return
        if scope["method"] not in {"GET", "HEAD"}:
            status, content = 405, b'{"error": "use GET"}'
        else:
            status, content = await answer()
        headers = [(b"content-type", b"application/json"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else content})

    return application
