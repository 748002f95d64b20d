"""Supervises the engine in a container on Modal: restarts it if it dies, and replaces the container if that fails."""

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Final, Self, TypeVar

import modal
import structlog

from flywheel_server import running_time
from flywheel_server.activity import Activity
from flywheel_server.engines.base import (
    Engine,
    EngineError,
    EngineFailedError,
    EngineModel,
    EngineStats,
    EngineUnavailableError,
    Event,
    PreparedRequest,
    PromptToken,
    Sink,
    Started,
)
from flywheel_server.engines.modal.waits import modal_result, retrieve_error
from flywheel_server.messages import GenerationRequest
from flywheel_server.supervision import Supervisor

log = structlog.stdlib.get_logger(__name__)

T = TypeVar("T")

LIVENESS_TIMEOUT: Final = 10.0
"""Seconds that a failed call waits for a check of whether the engine is dead. The check of a busy engine takes longer."""

CANCEL_TIMEOUT: Final = 1.0
"""Seconds that a dead engine has to end a cancelled call."""

EXIT_TIMEOUT: Final = 25.0
"""Seconds that the container has to answer its calls and end, before its process exits."""


class SupervisedEngine:
    """Passes calls on to an engine, and restarts the engine if it dies.

    If the engine dies, its calls end with `EngineUnavailableError`; a call that already has text may end with the engine's own
    error instead. Calls that arrive before the engine has started again end with `EngineUnavailableError` too.

    Arguments:
        engine: The engine, not yet started.
        give_up: Called if the engine is dead and cannot, or must not, be restarted.
        timeout: Seconds without a sign of life after which the engine is checked, and seconds that the check may take; see
            `Supervisor`.
        restarts: Whether a dead engine is restarted.
    """

    def __init__(
        self, engine: Engine, give_up: Callable[[], Awaitable[object]], *, timeout: float = 300.0, restarts: bool = True
    ) -> None:
        self._engine = engine
        self._activity = Activity()
        self._supervisor = Supervisor(engine, self._activity, self._mark_up, timeout=timeout, restarts=restarts)
        self._give_up = give_up
        self._stopping = asyncio.Event()
        self._running: asyncio.Task[None] | None = None
        # Pending while the engine is up, done while it is down.
        self._down: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._down.set_result(None)

    async def __aenter__(self) -> Self:
        up: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._running = asyncio.create_task(self._run(up))
        await up
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._stopping.set()
        if self._running is not None:
            await self._running

    async def _run(self, up: asyncio.Future[None]) -> None:
        try:
            async with self._supervisor.running():
                up.set_result(None)
                await self._stopping.wait()
        except Exception as error:
            if not up.done():
                up.set_exception(error)
                return
            log.exception("engine is lost")
            if not self._stopping.is_set():
                await self._give_up()

    @asynccontextmanager
    async def _mark_up(self) -> AsyncIterator[None]:
        self._down = asyncio.get_running_loop().create_future()
        try:
            yield
        finally:
            self._down.set_result(None)

    async def prepare(self, request: GenerationRequest) -> PreparedRequest:
        """See `Engine.prepare`."""
        try:
            with self._activity.within_engine():
                return await self._while_up(lambda: self._engine.prepare(request))
        except Exception as error:
            await self._raise_if_dead(error)
            raise

    async def generate(self, prepared: PreparedRequest, sink: Sink) -> None:
        """See `Engine.generate`."""
        watched = _WatchedSink(sink, self._activity)
        try:
            with self._activity.within_engine():
                await self._while_up(lambda: self._engine.generate(prepared, watched))
        except Exception as error:
            if not watched.has_text:
                await self._raise_if_dead(error)
            raise
        finally:
            watched.close()

    async def _while_up(self, work: Callable[[], Awaitable[T]]) -> T:
        """Returns the result of the work, or raises its error. Raises `EngineUnavailableError` if the engine is down."""
        down = self._down
        # A task of its own, because a dead engine may never end it.
        task = asyncio.create_task(_without_system_exit(work))
        try:
            await asyncio.wait((task, down), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise EngineUnavailableError("the engine has stopped, or is being started again")
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                task.add_done_callback(retrieve_error)
                await asyncio.wait((task, down), return_when=asyncio.FIRST_COMPLETED)
                await running_time.wait((task,), CANCEL_TIMEOUT)

    async def _raise_if_dead(self, error: Exception) -> None:
        """Raises `EngineUnavailableError` if the call has failed because the engine is dead. Waits for a check to find out."""
        if isinstance(error, EngineError) and not isinstance(error, EngineFailedError):
            return
        with suppress(TimeoutError):
            async with running_time.timeout(LIVENESS_TIMEOUT):
                await self._while_up(self._activity.confirmed_alive)

    async def tokenize(self, prepared: PreparedRequest) -> Sequence[PromptToken]:
        """See `Engine.tokenize`."""
        return await self._while_up(lambda: self._engine.tokenize(prepared))

    async def check(self) -> None:
        """See `Engine.check`."""
        await self._while_up(self._engine.check)

    async def stats(self) -> EngineStats:
        """See `Engine.stats`."""
        return await self._engine.stats()

    def is_reachable(self) -> bool:
        """See `Engine.is_reachable`."""
        return self._engine.is_reachable()

    def model(self) -> EngineModel:
        """See `Engine.model`."""
        return self._engine.model()


class _WatchedSink:
    """Passes the engine's events on, and reports each as a sign of life of the engine."""

    def __init__(self, sink: Sink, activity: Activity) -> None:
        self.has_text = False
        self._sink = sink
        self._activity = activity
        self._closed = False

    @property
    def is_full(self) -> bool:
        return self._sink.is_full

    def emit(self, event: Event) -> None:
        if self._closed:
            return
        if not isinstance(event, Started):
            self._activity.note_progress()
            self.has_text = True
        self._sink.emit(event)

    def close(self) -> None:
        """Drops further events, which a dead engine may still emit."""
        self._closed = True


async def _without_system_exit(work: Callable[[], Awaitable[T]]) -> T:
    try:
        return await work()
    except SystemExit as error:
        # In a task, SystemExit would end the event loop, and with it the container.
        raise EngineFailedError("the engine raised SystemExit") from error


async def end_container() -> None:
    """Asks Modal to send this container no more calls, and to end it after its calls have been answered.

    Modal starts another container for the next call. If the container does not end, because a thread of the dead engine
    blocks, the process exits after `EXIT_TIMEOUT`.
    """
    log.error("the container ends, so that another one takes its place")
    watchdog = threading.Timer(EXIT_TIMEOUT, os._exit, (1,))
    watchdog.daemon = True
    watchdog.start()
    try:
        await modal_result(modal.experimental.stop_fetching_inputs.aio())
    except Exception:
        log.exception("Modal was not told that the container ends")
