"""Keeps the engine running: starts it, notices when it is dead, and then restarts it or gives up."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Final

import structlog

from flywheel_server import running_time
from flywheel_server.activity import Activity
from flywheel_server.engines.base import Engine, EngineOverloadedError
from flywheel_server.system import descriptors
from flywheel_server.system.shortage import is_shortage

log = structlog.stdlib.get_logger(__name__)

RESTART_INTERVAL: Final = 10.0
"""Minimum seconds between two starts of an engine."""

MIN_RESTART_PAUSE: Final = 2.0
"""Minimum seconds between the end of a dead engine and its next start, so that its calls can send their statuses.

While llama.cpp loads a model, which may take minutes, nothing else runs in the process.
"""

STOP_TIMEOUT: Final = 10.0
"""Seconds that an engine has to stop. A dead engine may never stop."""

MIN_FREE_DESCRIPTORS: Final = 16
"""If fewer descriptors are free when an engine fails to start, their lack is taken for the cause. llama.cpp needs about 5."""


class EngineDiedError(Exception):
    """The engine is dead, and was not or could not be restarted."""


class Supervisor:
    """Runs the engine.

    An engine is suspected of being dead if it fails a call, or if it has calls and makes no progress with any of them for
    `timeout` seconds. Then it is checked. It is dead if the check fails, or if the check takes longer than `timeout` seconds
    and no call makes progress meanwhile.

    Arguments:
        engine: The engine, not yet started.
        activity: Signs of the engine's health that its calls give.
        serving: Makes a context that is entered while the engine is up, and in which the engine is given calls.
        timeout: Seconds of running time, so that an engine is not dead because the whole process was suspended.
        restarts: Whether a dead engine is restarted.

    Attributes:
        is_up: Whether the engine runs, and is not known to be dead.
        restart_count: How often a dead engine has been started again, and then worked.
    """

    def __init__(
        self,
        engine: Engine,
        activity: Activity,
        serving: Callable[[], AbstractAsyncContextManager[None]],
        *,
        timeout: float,
        restarts: bool,
    ) -> None:
        self.is_up = False
        self.restart_count = 0
        self._engine = engine
        self._activity = activity
        self._serving = serving
        self._timeout = timeout
        self._restarts = restarts

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Keeps the engine running for the length of the context.

        Raises `EngineError` if the engine does not start. If it dies and is not restarted, cancels the context and raises
        `EngineDiedError` in its place.
        """
        up = asyncio.Event()
        supervising = asyncio.create_task(self._supervise(up))
        supervising.add_done_callback(lambda _: up.set())
        body = asyncio.current_task()

        def interrupt(_: asyncio.Task[None]) -> None:
            # Ends the body of the context. The error of the supervision then replaces this cancellation.
            if body:
                body.cancel()

        try:
            await up.wait()
            if not supervising.done():
                supervising.add_done_callback(interrupt)
                yield
        except asyncio.CancelledError:
            if supervising.done() and body:
                body.uncancel()
            else:
                raise
        finally:
            supervising.remove_done_callback(interrupt)
            supervising.cancel()
            await asyncio.wait({supervising})
            if not supervising.cancelled() and (error := supervising.exception()):
                raise error

    async def _supervise(self, up: asyncio.Event) -> None:
        began = running_time.now()
        await self._run_once(up)
        while self._restarts:
            # Whatever killed the engine may kill it again at once.
            await running_time.sleep(max(began + RESTART_INTERVAL - running_time.now(), MIN_RESTART_PAUSE))
            log.warning("engine is started again")
            began = running_time.now()
            try:
                await self._run_once(up)
            except EngineDiedError:
                raise
            except Exception as error:
                if _is_for_lack_of_resources(error):
                    log.warning("engine is not started for want of descriptors, memory or threads", error=str(error))
                    continue
                raise EngineDiedError("the engine died, and does not start again") from error
        raise EngineDiedError("the engine died")

    async def _run_once(self, up: asyncio.Event) -> None:
        """Starts the engine, serves until it is dead, and stops it."""
        await self._engine.__aenter__()
        try:
            try:
                async with running_time.timeout(self._timeout):
                    await self._engine.check()
            except TimeoutError as error:
                raise EngineDiedError(f"the engine has started, but produced no token within {self._timeout:g} s") from error
            async with self._serving():
                self.restart_count += up.is_set()
                up.set()
                self.is_up = True
                await self._wait_until_dead()
        finally:
            self.is_up = False
            stopping = asyncio.create_task(self._engine.__aexit__(None, None, None))
            # In system time. With running time, a container whose event loop breaks crashes here (CPython 3.11.7 with uvloop
            # 0.23; the cause is unknown), as test_a_gateway_that_ends_by_itself_ends_its_container shows.
            await asyncio.wait({stopping}, timeout=STOP_TIMEOUT)
            if not stopping.done():
                raise EngineDiedError("the engine does not stop")
            stopping.result()

    async def _wait_until_dead(self) -> None:
        """Watches the engine, and returns when it is dead."""
        while True:
            self._activity.failed.clear()
            try:
                async with running_time.timeout(self._timeout):
                    await self._activity.failed.wait()
            except TimeoutError:
                if not self._activity.inside or self._activity.silence() < self._timeout:
                    continue
                log.warning("engine is silent", seconds=round(self._activity.silence()))
            if not await self._is_alive():
                log.error("engine is dead")
                return
            self._activity.confirm_alive()

    async def _is_alive(self) -> bool:
        """Checks the engine; returns whether it passes or makes progress within the timeout."""
        checking = asyncio.ensure_future(self._engine.check())
        try:
            # If the engine is busy, the check waits in its queue. Progress with other calls then shows that it is alive.
            await running_time.wait({checking}, self._timeout)
            if not checking.done():
                return self._activity.silence() < self._timeout
            if checking.cancelled():
                return False
            error = checking.exception()
            # An overloaded engine is alive. An engine that fails for a shortage would fail again after a restart.
            return error is None or isinstance(error, EngineOverloadedError) or is_shortage(error)
        finally:
            checking.cancel()
            await asyncio.gather(checking, return_exceptions=True)


def _is_for_lack_of_resources(error: Exception) -> bool:
    # Native code does not report why it cannot load a model, so a lack of descriptors is found by counting.
    return is_shortage(error) or descriptors.free() < MIN_FREE_DESCRIPTORS
