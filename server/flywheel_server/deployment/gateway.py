"""The server inside a container on Modal: on a thread of its own, beside Modal's event loop.

Modal grants a container 30 s (`GRACE`) from the signal that ends it. This is what it does with them; all times are at most:

     0 s    the address is withdrawn; whatever that takes, the server does not wait for it
     0 s    the server reports that it stops; for `withdraw_window` it takes calls, for `drain_timeout` more they may finish
    22 s    (`MAX_STOP_TIME`) calls that still run are cancelled on Modal, all side by side (`STOP_GRACE`)
    28 s    the last connections end (`STATUS_GRACE`), and their last bytes get through Modal's relay (`FLUSH`)
    29.5 s  (`STOP_LIMIT`) the container ends, whatever is still under way
"""

import asyncio
import os
import signal
import threading
import time
from concurrent.futures import Future
from contextlib import AsyncExitStack, suppress
from typing import Final

import structlog
from uvloop import new_event_loop

from flywheel_server import logs
from flywheel_server.deployment.tunnel import reachable
from flywheel_server.engine_factory import create_engine
from flywheel_server.server import serve
from flywheel_server.settings import Settings
from flywheel_server.system import descriptors, heap

log = structlog.stdlib.get_logger(__name__)

GRACE: Final = 30.0
"""Seconds that Modal grants a container to end."""

FLUSH: Final = 1.0
"""Seconds for the last bytes of the last calls to get through Modal's relay; the server hands them over and does not wait."""

STOP_LIMIT: Final = 29.5
"""Seconds after which the exit hook returns, whatever is still under way."""


class GatewayThread:
    """Runs the server beside Modal's own loop, which stands still between the inputs of a container.

    If the server ends by itself, for whatever reason, the container ends too, so that Modal starts another one.

    Arguments:
        settings: Those of the server. Without an API key it does not start: its address is on the open Internet.
        tunnelled_app: The app under whose name to publish a tunnel to the server. None if Modal forwards its port by itself.
        tunnel_interval: Seconds between two looks at the tunnel from outside. 0 for none.
    """

    def __init__(self, settings: Settings, tunnelled_app: str | None, tunnel_interval: float) -> None:
        if not settings.api_keys:
            raise ValueError("the gateway does not start without FLYWHEEL_API_KEYS, which belong into its modal.Secret")
        if settings.workers > 1:
            raise ValueError("the gateway is one process: leave out FLYWHEEL_WORKERS, and let Modal run more containers")
        self._settings = settings
        self._tunnelled_app = tunnelled_app
        self._tunnel_interval = tunnel_interval
        self._ready: Future[None] = Future()
        self._loop = new_event_loop()
        self._stop = asyncio.Event()
        self._told_to_stop = False
        self._ended = threading.Event()

    def start(self) -> None:
        """Returns when the server can be reached; raises what keeps it from that."""
        heap.limit_heaps()
        descriptors.raise_limit()
        logs.configure(self._settings.log_level, self._settings.log_format)
        threading.Thread(target=self._run, name="gateway", daemon=True).start()
        try:
            self._ready.result()
        except BaseException:
            # Modal runs no exit hook of a container that it ends while it starts.
            self.stop()
            raise

    def stop(self) -> None:
        """Withdraws the address, lets running calls finish within the drain timeout, and returns when all is closed.

        Returns after `STOP_LIMIT` seconds at the latest.
        """
        self._told_to_stop = True
        with suppress(RuntimeError):  # the loop is closed if the server has ended by itself
            self._loop.call_soon_threadsafe(self._stop.set)
        if not self._ended.wait(STOP_LIMIT):
            log.error("the gateway has not ended in time")

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._serve())
        except BaseException as error:
            # Whatever it is: the container would go on without a server.
            if not self._ready.done():
                self._ready.set_exception(error)
                return
            log.exception("the gateway broke")
        finally:
            self._ended.set()
        if not self._told_to_stop:
            log.error("the gateway has ended by itself: its container ends")
            _end_container()

    async def _serve(self) -> None:
        async with AsyncExitStack() as outlasting, serve(create_engine(self._settings), self._settings) as port:
            withdraw = None
            if self._tunnelled_app is not None:
                server = f"{self._settings.address.rpartition(':')[0]}:{port}"
                withdraw = await outlasting.enter_async_context(
                    reachable(self._tunnelled_app, server, self._tunnel_interval, self._stop.set)
                )
            outlasting.push_async_callback(asyncio.sleep, FLUSH)
            self._ready.set_result(None)
            try:
                await self._stop.wait()
            finally:
                # The server stops meanwhile: however slow Modal is, no new call is taken.
                if withdraw is not None:
                    withdraw()


def _end_container() -> None:
    """Ends this process as Modal itself would, so that the exit hooks run; without them if that does not help."""
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(GRACE)
    os._exit(1)
