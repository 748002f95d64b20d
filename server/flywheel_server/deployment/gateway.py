"""Runs the server inside a container on Modal, on a thread of its own, beside Modal's event loop.

Modal grants a container 30 s (`MODAL_GRACE_SECONDS`) from the signal that ends it. The container uses them so, at the latest:

     0 s    withdraws the address; the server does not wait for that
     0 s    reports NOT_SERVING; still accepts calls for `withdraw_window`, then lets calls finish for `drain_timeout`
    22 s    (`MAX_STOP_SECONDS`) cancels the remaining calls on Modal, concurrently
    28 s    closes the last connections, and waits until their last bytes are through Modal's relay (`FLUSH_SECONDS`)
    29.5 s  (`STOP_TIMEOUT`) ends, even if something is still running
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
from flywheel_server.deployment.tunnel import published_tunnel
from flywheel_server.engine_factory import create_engine
from flywheel_server.server import serve
from flywheel_server.settings import Settings
from flywheel_server.system import descriptors, garbage, heap, signals

log = structlog.stdlib.get_logger(__name__)

MODAL_GRACE_SECONDS: Final = 30.0
"""Seconds that Modal grants a container to end."""

FLUSH_SECONDS: Final = 1.0
"""Seconds for the last bytes of the last calls to pass Modal's relay, after the server has handed them over."""

STOP_TIMEOUT: Final = 29.5
"""Seconds after which the exit hook returns, even if something is still running."""


class GatewayThread:
    """Runs the server on a thread with an event loop of its own, because Modal's event loop stops between a container's inputs.

    If the server ends by itself, for whatever reason, the container ends too, so that Modal starts another one.

    Arguments:
        settings: The settings of the server. An API key is required, because the address is on the open Internet.
        tunnelled_app: The app for which to publish a tunnel to the server. None if Modal itself forwards the port.
        tunnel_interval: Seconds between two probes of the tunnel from outside. 0: no probes.
    """

    def __init__(self, settings: Settings, tunnelled_app: str | None, tunnel_interval: float) -> None:
        if not settings.api_keys:
            raise ValueError("the gateway does not start without FLYWHEEL_API_KEYS, which belong in its modal.Secret")
        if settings.workers > 1:
            raise ValueError("the gateway is one process: leave out FLYWHEEL_WORKERS, and let Modal run more containers")
        self._settings = settings
        self._tunnelled_app = tunnelled_app
        self._tunnel_interval = tunnel_interval
        self._ready: Future[None] = Future()
        self._loop = new_event_loop()
        self._stop = asyncio.Event()
        self._told_to_stop = False
        self._is_debug = False
        self._ended = threading.Event()
        self._serving: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Starts the server, and returns when it can be reached. Raises the error if it cannot start."""
        heap.limit_heaps()
        descriptors.raise_limit()
        logs.configure(self._settings.log_level, self._settings.log_format)
        signals.call_on_switch_debug(self._switch_debug)
        threading.Thread(target=self._run, name="gateway", daemon=True).start()
        try:
            self._ready.result()
        except BaseException:
            # Modal runs no exit hooks in a container that ends during its start.
            self.stop()
            raise

    def stop(self) -> None:
        """Withdraws the address, lets running calls finish within the drain timeout, and closes the server.

        Returns after `STOP_TIMEOUT` seconds at the latest.
        """
        self._told_to_stop = True
        with suppress(RuntimeError):  # the loop is closed if the server has ended by itself
            self._loop.call_soon_threadsafe(self._stop.set)
        if not self._ended.wait(STOP_TIMEOUT):
            log.error("the gateway has not ended in time")

    def _switch_debug(self) -> None:
        self._is_debug = not self._is_debug
        # Not in the main thread, which the signal may have interrupted while it logs.
        with suppress(RuntimeError):  # as in `stop`
            self._loop.call_soon_threadsafe(logs.set_debug, self._is_debug)

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                try:
                    runner.run(self._serve())
                finally:
                    self._end_serving()
        except BaseException as error:
            # Every exception counts: otherwise the container would go on without a server.
            if not self._ready.done():
                self._ready.set_exception(error)
                return
            log.exception("the gateway broke")
        finally:
            self._ended.set()
        if not self._told_to_stop:
            log.error("the gateway has ended by itself: its container ends")
            _end_container()

    def _end_serving(self) -> None:
        """Ends the server in order if its event loop broke off, before the runner cancels all other tasks of the loop.

        Among these is a task of gRPC that waits for the next call. If it is cancelled while the server runs, gRPC writes into
        memory that is no longer its own when the server stops (seen with grpcio 1.85.1).
        """
        if self._serving is not None and not self._serving.done():
            self._serving.cancel()
            self._loop.run_until_complete(asyncio.wait({self._serving}))

    async def _serve(self) -> None:
        self._serving = asyncio.current_task()
        async with AsyncExitStack() as outlasting, serve(create_engine(self._settings), self._settings) as port:
            withdraw = None
            if self._tunnelled_app is not None:
                server = f"{self._settings.address.rpartition(':')[0]}:{port}"
                withdraw = await outlasting.enter_async_context(
                    published_tunnel(self._tunnelled_app, server, self._tunnel_interval, self._stop.set)
                )
            outlasting.push_async_callback(asyncio.sleep, FLUSH_SECONDS)
            garbage.exempt()
            self._ready.set_result(None)
            try:
                await self._stop.wait()
            finally:
                # Not awaited: even if Modal is slow, the server stops accepting calls at once.
                if withdraw is not None:
                    withdraw()


def _end_container() -> None:
    """Ends this process as Modal does, so that the exit hooks run. If it goes on, exits without them."""
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(MODAL_GRACE_SECONDS)
    os._exit(1)
