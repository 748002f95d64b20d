"""Keeps the engine alive: starts it, notices when it is dead, and then starts it again or gives up."""

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
"""Seconds between two starts of an engine at least."""

TELLING_TIME: Final = 2.0
"""Seconds between the end of a dead engine and the next start, at least, for its calls to be told.

While llama.cpp loads a model, nothing else runs in the process, which may take minutes.
"""

STOP_TIMEOUT: Final = 10.0
"""Seconds that an engine has to stop. One that is dead may never do so."""

START_DESCRIPTORS: Final = 16
"""How many descriptors must be free for a failed start to be the engine's own fault. llama.cpp needs some 5 of them."""


class EngineDiedError(Exception):
    """The engine is dead, and was not or could not be started again."""


class Supervisor:
    """Runs the engine.

    An engine is in doubt when it fails a call, or when it works on some and makes nothing of any of them for `timeout` seconds.
    Then it has as long to produce a token, for us or for anybody; otherwise it is dead.

    Arguments:
        engine: The engine, not yet started.
        activity: What its calls show of its condition.
        serving: Makes the context in which the engine is given calls: it is entered while the engine is up.
        timeout: Seconds of running time: an engine is not dead because the whole process was stopped.
        restarts: Whether a dead engine is started again.
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
        self._engine = engine
        self._activity = activity
        self._serving = serving
        self._timeout = timeout
        self._restarts = restarts

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Keeps the engine up for the length of the context, which it cancels when the engine is dead for good.

        Raises `EngineError` if the engine does not start, and `EngineDiedError`.
        """
        up = asyncio.Event()
        living = asyncio.create_task(self._live(up))
        living.add_done_callback(lambda _: up.set())
        body = asyncio.current_task()

        def interrupt(_: asyncio.Task[None]) -> None:
            if body:
                body.cancel()

        try:
            await up.wait()
            if not living.done():
                living.add_done_callback(interrupt)
                yield
        except asyncio.CancelledError:
            if living.done() and body:
                body.uncancel()
            else:
                raise
        finally:
            living.remove_done_callback(interrupt)
            living.cancel()
            await asyncio.wait({living})
            if not living.cancelled() and (error := living.exception()):
                raise error

    async def _live(self, up: asyncio.Event) -> None:
        began = running_time.now()
        await self._lifetime(up)
        while self._restarts:
            # What kills the engine may come again at once.
            await running_time.sleep(max(began + RESTART_INTERVAL - running_time.now(), TELLING_TIME))
            log.warning("engine is started again")
            began = running_time.now()
            try:
                await self._lifetime(up)
            except EngineDiedError:
                raise
            except Exception as error:
                if _lacks_something(error):
                    log.warning("engine is not started for want of descriptors, memory or threads", error=str(error))
                    continue
                raise EngineDiedError("the engine died, and does not start again") from error
        raise EngineDiedError("the engine died")

    async def _lifetime(self, up: asyncio.Event) -> None:
        """Starts the engine, serves until it is dead, and stops it."""
        await self._engine.__aenter__()
        try:
            try:
                async with running_time.timeout(self._timeout):
                    await self._engine.check()
            except TimeoutError as error:
                raise EngineDiedError(f"the engine has started, but produced no token within {self._timeout:g} s") from error
            async with self._serving():
                up.set()
                await self._death()
        finally:
            stopping = asyncio.create_task(self._engine.__aexit__(None, None, None))
            # By the clock of the system. In running time, a container whose event loop breaks crashes here (CPython 3.11.7 with
            # uvloop 0.23; the cause is not known), as test_a_gateway_that_ends_by_itself_ends_its_container shows.
            await asyncio.wait({stopping}, timeout=STOP_TIMEOUT)
            if not stopping.done():
                raise EngineDiedError("the engine does not stop")
            stopping.result()

    async def _death(self) -> None:
        """Returns when the engine is dead."""
        while True:
            self._activity.failed.clear()
            try:
                async with running_time.timeout(self._timeout):
                    await self._activity.failed.wait()
            except TimeoutError:
                if not self._activity.inside or self._activity.silence() < self._timeout:
                    continue
                log.warning("engine is silent", seconds=round(self._activity.silence()))
            if not await self._answers():
                log.error("engine is dead")
                return
            self._activity.confirm_alive()

    async def _answers(self) -> bool:
        """Returns whether the engine shows a sign of life within the timeout."""
        checking = asyncio.ensure_future(self._engine.check())
        try:
            # Where it has much to do, the check waits for its turn; what it makes meanwhile for others will do.
            await running_time.wait({checking}, self._timeout)
            if not checking.done():
                return self._activity.silence() < self._timeout
            if checking.cancelled():
                return False
            error = checking.exception()
            # One that has too much to do is alive. One that lacks what the process has run out of would lack it anew.
            return error is None or isinstance(error, EngineOverloadedError) or is_shortage(error)
        finally:
            checking.cancel()
            await asyncio.gather(checking, return_exceptions=True)


def _lacks_something(error: Exception) -> bool:
    # Native code does not say why it cannot load a model.
    return is_shortage(error) or descriptors.free() < START_DESCRIPTORS
