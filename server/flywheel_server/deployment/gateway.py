"""The server inside a container on Modal: on a thread of its own, behind a tunnel, found through a `modal.Dict`."""

import asyncio
import threading
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Final

import modal
import structlog
from uvloop import new_event_loop

from flywheel_server import descriptors, logs
from flywheel_server.deployment.directory import published
from flywheel_server.engines.chosen import chosen_engine
from flywheel_server.server import serve
from flywheel_server.settings import Settings

log = structlog.stdlib.get_logger(__name__)

TUNNEL_FLUSH: Final = 1.0
"""Seconds for the last bytes of the last calls to get through the tunnel, which the server hands over and does not wait for."""

TUNNEL_CLOSE_TIMEOUT: Final = 2.0
"""Seconds to tell Modal that the tunnel is no longer needed."""


class GatewayThread:
    """Runs the server beside Modal's own loop, which stands still between the inputs of a container.

    Arguments:
        settings: Those of the server. Without an API key it does not start: its address is on the open Internet.
        tunnelled_app: The app under whose name to publish a tunnel to the server; None where Modal forwards its port by itself.
    """

    def __init__(self, settings: Settings, tunnelled_app: str | None) -> None:
        if not settings.api_keys:
            raise ValueError("the gateway does not start without FLYWHEEL_API_KEYS, which belong into its modal.Secret")
        self._settings = settings
        self._tunnelled_app = tunnelled_app
        self._ready: Future[None] = Future()
        self._loop = new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="gateway", daemon=True)

    def start(self) -> None:
        """Returns when the server can be reached; raises what keeps it from that."""
        descriptors.raise_limit()
        logs.configure(self._settings.log_level, self._settings.log_format)
        self._thread.start()
        self._ready.result()

    def stop(self) -> None:
        """Withdraws the address, lets running calls finish within the drain timeout, and returns when all is closed."""
        with suppress(RuntimeError):  # the loop is closed where the server broke
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            try:
                runner.run(self._serve())
            except Exception as error:
                if self._ready.done():
                    log.exception("the gateway did not end well")
                else:
                    self._ready.set_exception(error)

    async def _serve(self) -> None:
        async with AsyncExitStack() as tunnel, AsyncExitStack() as server:
            port = await server.enter_async_context(serve(chosen_engine(self._settings), self._settings))
            async with AsyncExitStack() as directory:
                if self._tunnelled_app is not None:
                    # It outlasts the server, whose last calls still need it when the address has long been withdrawn.
                    address = await tunnel.enter_async_context(_tunnel(port))
                    await directory.enter_async_context(published(self._tunnelled_app, address))
                    log.info("reachable", address=address)
                self._ready.set_result(None)
                await self._stop.wait()


@asynccontextmanager
async def _tunnel(port: int) -> AsyncIterator[str]:
    """Opens the port to the Internet for the length of the context, which gets the address; raises `modal.exception.Error`."""
    async with AsyncExitStack() as stack:
        forwarded = await stack.enter_async_context(modal.forward(port, h2_enabled=True))
        closing = stack.pop_all()
    try:
        yield f"{forwarded.host}:{forwarded.port}"
    finally:
        await asyncio.sleep(TUNNEL_FLUSH)
        # It ends with the container anyway.
        with suppress(modal.exception.Error, OSError):
            async with asyncio.timeout(TUNNEL_CLOSE_TIMEOUT):
                await closing.aclose()
