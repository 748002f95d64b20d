"""The life of each generation, and of all of them together.

Each is admitted, within its deadline, counted, and checked against promise 1 of the contract: one finished sample per index.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from typing import Final

import structlog

from flywheel_server import running_time
from flywheel_server.access.callers import Caller
from flywheel_server.access.quotas import Usage
from flywheel_server.activity import Activity
from flywheel_server.admission_control import AdmissionControl
from flywheel_server.engines.base import (
    Engine,
    EngineFailedError,
    EngineModel,
    EngineUnavailableError,
    Event,
    PreparedRequest,
    Sink,
    Started,
)
from flywheel_server.errors import DeadlineExceededError, UnauthenticatedError
from flywheel_server.messages import GenerationRequest, GenerationResponseSample
from flywheel_server.preparation import Preparation

log = structlog.stdlib.get_logger(__name__)

DEADLINE_MARGIN: Final = 0.05
"""The share of the remaining time, and at most so many seconds, by which the server ends a call before its deadline.

The caller's own timer fires at the deadline and drops whatever comes later; only an earlier status reaches it with details.
"""


class Generations:
    """Runs requests on the engine, while the engine is up.

    Attributes:
        engine: The engine.
        activity: What the generations show of the engine's condition.
        queued: Generations that the engine has not begun.
        active: Generations that the engine has begun, and that have not ended.
    """

    def __init__(self, engine: Engine, admission: AdmissionControl) -> None:
        self.queued = 0
        self.active = 0
        self.activity = Activity()
        self.engine = engine
        self._admission = admission
        self._preparation = Preparation(engine)
        self._model: EngineModel | None = None
        self._closed = False
        self._running: set[Generation] = set()
        self._one_has_left = asyncio.Event()

    @property
    def is_open(self) -> bool:
        """Whether new requests are run."""
        return self._model is not None

    def model(self) -> EngineModel:
        """Returns what the engine runs. Raises `EngineUnavailableError` unless the generations are open."""
        if self._model is None:
            raise EngineUnavailableError("the server is starting or stopping")
        return self._model

    def open(self) -> None:
        """Runs requests from now on, unless `close` was called: the engine has started."""
        if not self._closed:
            self._model = self.engine.model()
            self._admission.set_capacity(self._model)
            self._preparation.set_threads(self._model.tokenizers)

    def interrupt(self) -> None:
        """Refuses new requests, and ends the generations under way: the engine stops."""
        self._model = None
        self._end_all("the engine stops")

    def revoke(self, callers: Collection[str]) -> None:
        """Ends the generations of the callers with these names, whose keys were revoked."""
        for generation in self._running:
            if generation.caller.name in callers:
                generation.end(UnauthenticatedError("API_KEY_REVOKED"))

    async def close(self, drain_timeout: float) -> None:
        """Refuses new requests for good, and returns when all generations have ended.

        The generations under way have `drain_timeout` seconds to finish. Those that have not finished then, or when this is
        cancelled, are ended with `EngineUnavailableError`.
        """
        self._closed = True
        self._model = None
        running = self.active + self.queued
        log.info("stopping", running_calls=running, drain_timeout=drain_timeout if running else 0)
        try:
            with suppress(TimeoutError):
                async with running_time.timeout(drain_timeout):
                    await self._all_left()
        finally:
            self._end_all("the server is stopping")
            await self._all_left()

    def _end_all(self, why: str) -> None:
        for generation in self._running:
            generation.end(EngineUnavailableError(why))

    async def _all_left(self) -> None:
        while self._running:
            self._one_has_left.clear()
            await self._one_has_left.wait()

    async def run(
        self,
        request: GenerationRequest,
        caller: Caller,
        time_remaining: float | None,
        deliver: Callable[["Generation"], Awaitable[None]],
    ) -> None:
        """Delivers the generation of a request once it has its room in the engine, which it keeps until it is delivered.

        Raises the call's error: `EngineUnavailableError` unless the generations are open.

        Arguments:
            request: What to generate.
            caller: For whom.
            time_remaining: Seconds; when they are over, `DeadlineExceededError` is raised.
            deliver: Runs the generation, and takes what comes of it to the caller.
        """
        self.model()
        time_remaining = _within(time_remaining)
        generation = Generation(self, caller, request.num_samples, time_remaining)
        self._running.add(generation)
        try:
            async with (
                generation.deadline,
                self._admission.entered(request, caller, time_remaining) as (generation.usage, place),
            ):
                place.call_if_lost(generation.end)
                with self.activity.failures_noticed():
                    generation.prepared = await self._preparation.prepare(request, caller, generation.usage)
                await place.admitted(generation.prepared.context_tokens, generation.time_remaining())
                await deliver(generation)
        except Exception as error:
            # Not only TimeoutError: an engine may make of its cancel what it likes.
            if not generation.deadline.expired():
                raise
            raise generation.why_it_ended() from error
        finally:
            generation.leave()
            self._running.remove(generation)
            self._one_has_left.set()


def _within(time_remaining: float | None) -> float | None:
    if time_remaining is None:
        return None
    return time_remaining - min(DEADLINE_MARGIN, time_remaining * DEADLINE_MARGIN)


class Generation:
    """One request on its way through the engine. To the engine, it is the sink for its events.

    Attributes:
        caller: For whom.
        deadline: Ends the generation.
        prepared: The request as the engine takes it, once it was prepared.
        usage: Counts what it costs.
    """

    prepared: PreparedRequest
    usage: Usage
    _sink: Sink

    def __init__(self, generations: Generations, caller: Caller, num_samples: int, time_remaining: float | None) -> None:
        self.caller = caller
        self._loop = asyncio.get_running_loop()
        self.deadline = asyncio.timeout(time_remaining)
        self._generations = generations
        self._activity = generations.activity
        self._unfinished = set(range(num_samples))
        self._started = False
        self._has_left = False
        self._ended_by: Exception | None = None
        generations.queued += 1

    def end(self, error: Exception) -> None:
        """Ends the generation with an error, unless it is ending already."""
        if self._ended_by is None and not self._has_left and not self.deadline.expired():
            self._ended_by = error
            self.deadline.reschedule(self._loop.time())

    def time_remaining(self) -> float | None:
        """Returns the seconds until the deadline; None if there is none."""
        when = self.deadline.when()
        return None if when is None else when - self._loop.time()

    def why_it_ended(self) -> Exception:
        """Returns the error to raise if the deadline has passed, or `end` has brought it forward."""
        return self._ended_by or DeadlineExceededError("IN_GENERATION" if self._started else "IN_QUEUE")

    async def run(self, sink: Sink) -> None:
        """Has the engine generate, and returns when all samples have finished; cancelling it stops the work.

        The sink gets the events. Raises `EngineError`: `EngineFailedError` unless each sample finishes once, and none more.
        """
        self._sink = sink
        with self._activity.within_engine():
            await self._generations.engine.generate(self.prepared, self)
            if self._unfinished:
                raise EngineFailedError(f"samples {sorted(self._unfinished)} did not finish")

    @property
    def is_full(self) -> bool:
        """Whether the reader is behind; see `Sink`."""
        return self._sink.is_full

    def emit(self, event: Event) -> None:
        """Passes an event on; see `Sink`."""
        if self._has_left:
            return  # the engine had sent it before it learned of the cancel
        if isinstance(event, Started):
            self._start()
            self.usage.begin(event.prompt_tokens)
        elif not self._started:
            raise EngineFailedError("an event came before the generation was started")
        elif event.index not in self._unfinished:
            raise EngineFailedError(f"sample {event.index} was not asked for or had finished")
        else:
            self._activity.sign()
            self.usage.count(event)
            if isinstance(event, GenerationResponseSample):
                self._unfinished.remove(event.index)
        self._sink.emit(event)

    def _start(self) -> None:
        if self._started:
            raise EngineFailedError("the generation was started twice")
        self._started = True
        self._generations.queued -= 1
        self._generations.active += 1

    def leave(self) -> None:
        """Stops counting the generation as under way, and takes no further events."""
        self._has_left = True
        if self._started:
            self._generations.active -= 1
        else:
            self._generations.queued -= 1
