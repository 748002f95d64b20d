"""An app of everything that the stand-in of Modal's cloud plays."""

import asyncio
import os
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import modal

VOLUME = os.environ.get("SAMPLE_VOLUME", "/volume")
PORT = int(os.environ.get("SAMPLE_PORT", "8000"))
VARIABLES: dict[str, str | None] = {"SAMPLE_VOLUME": VOLUME, "SAMPLE_PORT": str(PORT)}

image = modal.Image.debian_slim(python_version="3.11").pip_install("numpy").env({"FROM_IMAGE": "an image"})
app = modal.App("sample", image=image, tags={"made": "at-deployment"})


def say(what: str) -> None:
    sys.stdout.write(f"{what}\n")


def listen(port: int = 0) -> int:
    """Echoes on a port of the loopback interface, and returns the port."""
    server = socket.create_server(("127.0.0.1", port))

    def echo(connection: socket.socket) -> None:
        while data := connection.recv(1024):
            connection.sendall(data)

    def accept() -> None:
        while True:
            threading.Thread(target=echo, args=(server.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return int(server.getsockname()[1])


@app.cls(min_containers=1)
class Gateway:
    @modal.enter()
    def enter(self) -> None:
        self.opened = ExitStack()
        for h2_enabled in (True, False):
            self.opened.enter_context(modal.forward(listen(), h2_enabled=h2_enabled))
        say("entered")

    @modal.exit()
    def leave(self) -> None:
        self.opened.pop_all().close()
        say("left")


@app.server(port=PORT, h2_enabled=True, env=VARIABLES)
class GatewayServer:
    @modal.enter()
    def enter(self) -> None:
        listen(PORT)

    @modal.exit()
    def leave(self) -> None:
        say("left")


@app.cls(
    env=VARIABLES,
    secrets=[modal.Secret.from_name("sample-keys", required_keys=["KEY"])],
    volumes={VOLUME: modal.Volume.from_name("sample-volume", create_if_missing=True)},
)
@modal.concurrent(max_inputs=1000)
class Model:
    @modal.method()
    async def echo(self, value: Any) -> Any:
        return value

    @modal.method()
    async def sleep(self, name: str = "") -> None:
        try:
            say(f"sleeping {name}")
            await asyncio.sleep(1000)
        finally:
            say(f"awake {name}")

    @modal.method()
    async def fail(self) -> None:
        raise ValueError("as asked")

    @modal.method()
    async def count(self, to: int) -> AsyncIterator[int]:
        for number in range(to):
            yield number

    @modal.method()
    async def surroundings(self) -> tuple[dict[str, str], str]:
        return dict(os.environ), __file__

    @modal.method()
    async def clocks(self) -> tuple[list[float], float, Any]:
        now = datetime.now(UTC)
        assert isinstance(now, datetime)
        assert isinstance(datetime.fromtimestamp(0, UTC), date)
        readings = [time.time(), time.time_ns() / 1e9, now.timestamp(), time.mktime(time.localtime()), time.clock_gettime(0)]
        return readings, time.monotonic(), now

    @modal.method()
    async def write(self, name: str, text: str) -> None:
        await asyncio.to_thread(Path(VOLUME, name).write_text, text)

    @modal.method()
    async def send(self, queue: modal.Queue, partition: str, values: list[Any]) -> None:
        await queue.put_many.aio(values, partition=partition)


@app.cls()
class Broken:
    @modal.enter()
    def enter(self) -> None:
        raise RuntimeError("no such weights")

    @modal.method()
    def answer(self) -> int:
        return 42


@app.function()
def hello(name: str = "you") -> None:
    say(f"hello {name}")


@app.function()
@modal.asgi_app()
def web() -> Any:
    async def answer(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            raise NotImplementedError
        await receive()
        await send({"type": "http.response.start", "status": 203, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": scope["path"].encode() + b"?" + scope["query_string"]})

    return answer
