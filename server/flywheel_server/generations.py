"""The generations that are under way: admitted, within their deadlines, counted, and checked against promise 1."""

import asyncio
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from typing import Final

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

DEADLINE_MARGIN: Final = 0.05
"""The share of the remaining time, and at most so many seconds, by which the server ends a call before its deadline.

The caller's own timer fires at the deadline and drops whatever comes later; only an earlier status reaches it with details.
"""


class Generations:
    """Runs requests on the engine. `queued` counts those that the engine has not begun, `active` those that it has.

    Attributes:
        engine: The engine.
        activity: What they show of the engine's condition.
    """

    def __init__(self, engine: Engine, admission: AdmissionControl) -> None:
        self.queued = 0
        self.active = 0
        self.activity = Activity()
        self.engine = engine
        self._admission = admission
        self._preparation = Preparation(engine)
        self._running: set[Generation] = set()
        self._one_has_left = asyncio.Event()

    def set_capacity(self, model: EngineModel) -> None:
        """Lets in as much at a time as the engine works on with this model."""
        self._admission.set_capacity(model)
        self._preparation.set_threads(model.tokenizers)

    async def drain(self, timeout: float) -> None:  # noqa: ASYNC109 - not the caller's, but that of the generations
        """Gives the generations under way `timeout` seconds to finish, and ends the others with `EngineUnavailableError`."""
        try:
            with suppress(TimeoutError):
                async with running_time.timeout(timeout):
                    await self._all_left()
        finally:
            self.end_all("the server is stopping")
            await self._all_left()

    def end_all(self, why: str) -> None:
        """Ends all generations with `EngineUnavailableError`."""
        for generation in self._running:
            generation.end(EngineUnavailableError(why))

    def end_those_of(self, callers: Collection[str]) -> None:
        """Ends the generations of the callers with these names, whose keys were revoked."""
        for generation in self._running:
            if generation.caller.name in callers:
                generation.end(UnauthenticatedError("API_KEY_REVOKED"))

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

        Arguments:
            request: What to generate.
            caller: For whom.
            time_remaining: Seconds; when they are over, `DeadlineExceededError` is raised.
            deliver: Runs the generation, and takes what comes of it to the caller.
        """
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
