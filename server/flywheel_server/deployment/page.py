"""A page that says where the gateways are, for callers without an account on Modal: JSON over HTTPS, as an ASGI application."""

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
"""Seconds for which an answer is not looked for anew: many callers cost one look at the directory."""

MAX_AGE: Final = 15.0
"""How old an answer may be, in seconds, while the next is on its way: Modal may take 8 s."""

Asgi = Callable[
    [MutableMapping[str, Any], Callable[[], Awaitable[Any]], Callable[[MutableMapping[str, Any]], Awaitable[None]]],
    Awaitable[None],
]


def json_page(read: Callable[[], Awaitable[Iterable[Any]]]) -> Asgi:
    """Returns an application that answers every GET with `{"endpoints": […]}`: the dataclasses that `read` returns.

    Where `read` fails, the answer is 503.
    """
    reading: asyncio.Task[None] | None = None
    known: tuple[int, bytes] = (503, b"")
    known_at = -inf

    async def read_anew() -> None:
        nonlocal known, known_at
        try:
            endpoints = [dataclasses.asdict(endpoint) for endpoint in await read()]
            known = 200, json.dumps({"endpoints": endpoints}).encode()
        except Exception as error:  # noqa: BLE001 - the page has no other words for it
            log.warning("addresses not read", error=str(error))
            known = 503, b'{"error": "Modal does not say where the gateways are. Try again later."}'
        known_at = time.monotonic()

    async def answer() -> tuple[int, bytes]:
        nonlocal reading
        age = time.monotonic() - known_at
        if age > CACHE_SECONDS:
            if reading is None or reading.done():
                reading = asyncio.create_task(read_anew())
            if known[0] != HTTPStatus.OK or age > MAX_AGE:
                await asyncio.shield(reading)  # which other callers wait for too
        return known

    async def application(
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[Any]],  # noqa: ARG001 - as ASGI calls it
        send: Callable[[MutableMapping[str, Any]], Awaitable[None]],
    ) -> None:
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
