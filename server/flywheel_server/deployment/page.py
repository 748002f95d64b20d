"""A page that says where the gateways are, for callers without an account on Modal: JSON over HTTPS, as an ASGI application."""

import asyncio
import dataclasses
import json
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, Final

CACHE_SECONDS: Final = 5.0
"""How old an answer may be: many callers cost one look at the directory."""

Asgi = Callable[
    [MutableMapping[str, Any], Callable[[], Awaitable[Any]], Callable[[MutableMapping[str, Any]], Awaitable[None]]],
    Awaitable[None],
]


def json_page(read: Callable[[], Awaitable[Iterable[Any]]]) -> Asgi:
    """Returns an application that answers every GET with `{"endpoints": […]}`: the dataclasses that `read` returns.

    Where `read` fails, the answer is 503.
    """
    reading = asyncio.Lock()
    known: bytes = b""
    known_until = 0.0

    async def body() -> bytes:
        nonlocal known, known_until
        async with reading:
            if time.monotonic() > known_until:
                endpoints = [dataclasses.asdict(endpoint) for endpoint in await read()]
                known = json.dumps({"endpoints": endpoints}).encode()
                known_until = time.monotonic() + CACHE_SECONDS
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
            try:
                status, content = 200, await body()
            except Exception as error:  # noqa: BLE001 - the page has no other words for it
                status, content = 503, json.dumps({"error": str(error)}).encode()
        headers = [(b"content-type", b"application/json"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else content})

    return application
