"""The server inside a container on Modal: on a thread of its own, behind a tunnel, found through a `modal.Dict`."""

import asyncio
import threading
from concurrent.futures import Future
from contextlib import AsyncExitStack, suppress

import modal
import structlog
from uvloop import new_event_loop

from flywheel_server import logs
from flywheel_server.deployment.directory import published
from flywheel_server.engines.chosen import chosen_engine
from flywheel_server.server import serve
from flywheel_server.settings import Settings

log = structlog.stdlib.get_logger(__name__)


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
                    forwarded = await tunnel.enter_async_context(modal.forward(port, h2_enabled=True))
                    address = f"{forwarded.host}:{forwarded.port}"
                    await directory.enter_async_context(published(self._tunnelled_app, address))
                    log.info("reachable", address=address)
                self._ready.set_result(None)
                await self._stop.wait()
