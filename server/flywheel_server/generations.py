"""Runs generations on the engine, from admission to their end, and stops them when the server or the engine stops.

A generation is bounded by its deadline, counted, and checked against promise 1 of the contract: one finished sample per index.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final

import structlog

from flywheel_server import running_time
from flywheel_server.access.callers import Caller
from flywheel_server.access.quotas import Usage
from flywheel_server.activity import Activity, stats_of
from flywheel_server.admission_control import AdmissionControl, Place
from flywheel_server.engines.base import (
    Engine,
    EngineFailedError,
    EngineModel,
    EngineStats,
    EngineUnavailableError,
    Event,
    InvalidFieldError,
    PreparedRequest,
    PromptToken,
    PromptTooLongError,
    Sink,
    Started,
    TextDelta,
)
from flywheel_server.errors import DeadlineExceededError, UnauthenticatedError
from flywheel_server.messages import FieldViolation, GenerationRequest, GenerationResponseSample
from flywheel_server.preparation import Preparation
from flywheel_server.telemetry.calls import current_call

log = structlog.stdlib.get_logger(__name__)

DEADLINE_MARGIN: Final = 0.05
"""How long before its deadline the server ends a call: this share of the remaining time, and at most this many seconds.

At the deadline, the client ends the call by itself, so a status with details must reach it earlier.
"""


@dataclass(frozen=True, slots=True)
class Counts:
    """How busy a server is: its generations, counted as in `Generations`, and the figures of its engine."""

    active: int
    queued: int
    engine: EngineStats


GetCounts = Callable[[], Awaitable[Counts]]
"""Returns the counts of all processes of a server. Raises `EngineError` if the engine cannot say how busy it is."""


class Generations:
    """All generations of this process, one for each call. New ones start only between `open` and `interrupt` or `close`.

    Attributes:
        engine: The engine.
        activity: Signs of the engine's health that the generations give.
        queued: Generations that the engine has not started.
        active: Generations that the engine has started and that have not ended.
        drained: Generations that `close` has ended because they took too long.
        last_model: The engine's model, as it was when the engine last started; None before that.
    """

    def __init__(self, engine: Engine, admission: AdmissionControl) -> None:
        self.queued = 0
        self.active = 0
        self.drained = 0
        self.last_model: EngineModel | None = None
        self.activity = Activity()
        self.engine = engine
        self._admission = admission
        self._preparation = Preparation(engine)
        self._refuses_because = "the engine is starting"
        """Why new requests are refused; empty if they are not."""
        self._closed = False
        self._running: set[Generation] = set()
        self._one_ended = asyncio.Event()

    @property
    def is_open(self) -> bool:
        """Whether new requests are accepted."""
        return not self._refuses_because

    def model(self) -> EngineModel:
        """Returns the engine's model, as it is now. Raises `EngineUnavailableError` unless new requests are accepted."""
        if self._refuses_because:
            raise EngineUnavailableError(self._refuses_because)
        return self.engine.model()

    async def counts(self) -> Counts:
        """Returns the counts of this process; see `GetCounts`."""
        stats = await stats_of(self.engine)
        return Counts(self.active, self.queued, stats)

    def open(self) -> None:
        """Accepts requests from now on, unless `close` was called. To be called when the engine has started."""
        if not self._closed:
            model = self.last_model = self.engine.model()
            self._refuses_because = ""
            self._admission.set_capacity(model)
            self._preparation.set_threads(model.tokenizers)

    def interrupt(self) -> None:
        """Refuses new requests until `open` is called again, and ends all generations. To be called when the engine stops."""
        if not self._closed:
            self._refuses_because = "the engine was dead, and has not started again"
        self._end_all("the engine stops")

    def revoke(self, callers: Collection[str]) -> None:
        """Ends all generations of the callers with these names, because their keys were revoked."""
        for generation in self._running:
            if generation.caller.name in callers:
                generation.end(UnauthenticatedError("API_KEY_REVOKED"))

    async def close(self, drain_timeout: float) -> None:
        """Refuses new requests forever, drains the generations, and returns when all have ended.

        Generations that have not finished after `drain_timeout` seconds are ended with `EngineUnavailableError`. Cancelling
        this method ends them at once.
        """
        self._closed = True
        self._refuses_because = "the server is stopping"
        running = self.active + self.queued
        log.info("stopping", running_calls=running, drain_timeout=drain_timeout if running else 0)
        try:
            with suppress(TimeoutError):
                async with running_time.timeout(drain_timeout):
                    await self._wait_until_all_ended()
        finally:
            self.drained += sum(not generation.is_ending for generation in self._running)
            self._end_all("the server is stopping")
            await self._wait_until_all_ended()

    def _end_all(self, why: str) -> None:
        for generation in self._running:
            generation.end(EngineUnavailableError(why))

    async def _wait_until_all_ended(self) -> None:
        while self._running:
            self._one_ended.clear()
            await self._one_ended.wait()

    async def run(
        self,
        request: GenerationRequest,
        caller: Caller,
        time_remaining: float | None,
        deliver: Callable[["Generation"], Awaitable[None]],
    ) -> None:
        """Admits a request to the engine, and then delivers its generation.

        The call keeps its slots in the engine until `deliver` returns. Raises the call's error, which is
        `EngineUnavailableError` if new requests are not accepted.

        Arguments:
            request: The request.
            caller: The caller.
            time_remaining: Seconds after which `DeadlineExceededError` is raised; None if there is no deadline.
            deliver: Runs the generation, and sends its output to the caller.
        """

        async def admit_and_deliver(generation: Generation, place: Place) -> None:
            await place.admitted(generation.prepared.context_tokens, generation.time_remaining())
            generation.note_admitted()
            await deliver(generation)

        if record := current_call.get():
            record.operation = "chat" if request.messages else "text_completion"
        await self._prepared(request, caller, time_remaining, admit_and_deliver)

    async def tokenize(
        self,
        request: GenerationRequest,
        caller: Caller,
        time_remaining: float | None,
        deliver: Callable[[Sequence[PromptToken]], Awaitable[None]],
    ) -> None:
        """Delivers the tokens of the prompt of a request, which count against the caller's quota. Generates nothing.

        Arguments and errors are those of `run`. The call has a place in the queue, but needs no slots.
        """

        async def deliver_tokens(generation: Generation, place: Place) -> None:
            await place.joined()
            generation.note_admitted()
            with self.activity.noticing_failures():
                tokens = await self.engine.tokenize(generation.prepared)
            generation.usage.set_prompt_tokens(len(tokens))
            await deliver(tokens)

        try:
            await self._prepared(request, caller, time_remaining, deliver_tokens)
        except PromptTooLongError as error:
            error.is_generation = False
            raise

    async def violations(
        self, request: GenerationRequest, caller: Caller, time_remaining: float | None
    ) -> Sequence[FieldViolation]:
        """Returns what the engine finds wrong with a part of a request that is refused in any case.

        The engine checks the part like any request, in the caller's turn: this way, nobody gets more work done. Returns nothing
        if the engine cannot be asked now, for example because the server is full. Arguments are those of `run`.
        """

        async def drop(generation: Generation, _: Place) -> None:
            generation.usage.set_prompt_tokens(0)

        try:
            await self._prepared(request, caller, time_remaining, drop)
        except InvalidFieldError as error:
            return error.violations
        except Exception as error:  # noqa: BLE001 - the request is refused for what is known to be wrong with it
            log.debug("the engine did not check a refused request", error=type(error).__name__)
        finally:
            if record := current_call.get():
                record.request = None  # it was only a part of the request
        return ()

    async def _prepared(
        self,
        request: GenerationRequest,
        caller: Caller,
        time_remaining: float | None,
        work: Callable[["Generation", Place], Awaitable[None]],
    ) -> None:
        """Runs the work of a call, from its place in the queue on, once the engine has prepared its request."""
        model = self.model()
        if record := current_call.get():
            record.request, record.model = request, model.name
        caller = replace(caller, priority=caller.priority + request.priority) if request.priority else caller
        time_remaining = _with_margin(time_remaining)
        generation = Generation(self, caller, request.num_samples, time_remaining)
        self._running.add(generation)
        try:
            async with (
                generation.deadline,
                self._admission.acquire(request, caller, time_remaining) as (generation.usage, place),
            ):
                place.call_if_evicted(generation.end)
                with self.activity.noticing_failures():
                    generation.prepared = await self._preparation.prepare(request, caller, generation.usage)
                await work(generation, place)
        except Exception as error:
            # Not only TimeoutError: an engine may raise any error when it is cancelled.
            if not generation.deadline.expired():
                if isinstance(error, PromptTooLongError):
                    error.field = request.prompt_field
                raise
            raise generation.deadline_error() from error
        finally:
            generation.close()
            self._running.remove(generation)
            self._one_ended.set()


def _with_margin(time_remaining: float | None) -> float | None:
    if time_remaining is None:
        return None
    return time_remaining - min(DEADLINE_MARGIN, time_remaining * DEADLINE_MARGIN)


class Generation:
    """The generation for one request, which checks, counts and passes on the events that the engine emits.

    Attributes:
        caller: The caller.
        deadline: The timeout of the call, which `end` moves to now.
        prepared: The request, prepared for the engine; set before `run`.
        usage: Counts the tokens of the call; replaced before `run`.
    """

    prepared: PreparedRequest
    _sink: Sink

    def __init__(self, generations: Generations, caller: Caller, num_samples: int, time_remaining: float | None) -> None:
        self.caller = caller
        self.usage = Usage()
        self._loop = asyncio.get_running_loop()
        self.deadline = asyncio.timeout(time_remaining)
        self._generations = generations
        self._activity = generations.activity
        self._unfinished = set(range(num_samples))
        self._started = False
        self._is_closed = False
        self._ended_by: Exception | None = None
        generations.queued += 1
        self._record = current_call.get()
        self._silent = set(self._unfinished) if self._record is not None else set()
        """The samples whose first output is to be noted in the record."""
        if self._record is not None:
            self._record.queued_at = time.perf_counter()
            self._record.num_samples = num_samples

    def note_admitted(self) -> None:
        """Notes that the generation has its slots in the engine, or that it needs none."""
        if self._record is not None:
            self._record.admitted_at = time.perf_counter()

    @property
    def is_ending(self) -> bool:
        """Whether the generation has ended, or an error or its deadline is ending it."""
        return self._ended_by is not None or self._is_closed or self.deadline.expired()

    def end(self, error: Exception) -> None:
        """Ends the generation with an error, unless it is ending already."""
        if not self.is_ending:
            self._ended_by = error
            self.deadline.reschedule(self._loop.time())

    def time_remaining(self) -> float | None:
        """Returns the seconds until the deadline; None if there is none."""
        when = self.deadline.when()
        return None if when is None else when - self._loop.time()

    def deadline_error(self) -> Exception:
        """Returns the error of a generation whose `deadline` has expired, by itself or by `end`."""
        return self._ended_by or DeadlineExceededError("IN_GENERATION" if self._started else "IN_QUEUE")

    async def run(self, sink: Sink) -> None:
        """Runs the request on the engine, emits the events to the sink, and returns when all samples have finished.

        Cancelling this method stops the engine's work on the request. Raises `EngineError`, for example `EngineFailedError` if
        the engine does not finish each sample exactly once.
        """
        self._sink = sink
        with self._activity.within_engine():
            await self._generations.engine.generate(self.prepared, self)
            if self._unfinished:
                raise EngineFailedError(f"samples {sorted(self._unfinished)} did not finish")

    @property
    def is_full(self) -> bool:
        """See `Sink.is_full`."""
        return self._sink.is_full

    def emit(self, event: Event) -> None:
        """Checks and counts an event, and passes it on; see `Sink.emit`."""
        if self._is_closed:
            return  # the engine sent it before it noticed the cancellation
        if isinstance(event, Started):
            self._start()
            self.usage.set_prompt_tokens(event.prompt_tokens)
        elif not self._started:
            raise EngineFailedError("an event came before the generation was started")
        elif event.index not in self._unfinished:
            raise EngineFailedError(f"sample {event.index} was not asked for or had finished")
        else:
            self._activity.note_progress()
            self.usage.count(event)
            if event.index in self._silent:
                self._note_first_output(event)
            if isinstance(event, GenerationResponseSample):
                self._unfinished.remove(event.index)
                if self._record is not None:
                    self._record.note_sample(event)
        self._sink.emit(event)

    def _start(self) -> None:
        if self._started:
            raise EngineFailedError("the generation was started twice")
        self._started = True
        self._generations.queued -= 1
        self._generations.active += 1
        if self._record is not None:
            self._record.started_at = time.perf_counter()

    def _note_first_output(self, event: TextDelta | GenerationResponseSample) -> None:
        self._silent.discard(event.index)
        if self._record is not None:
            self._record.note_first_output(event.index, is_streamed=isinstance(event, TextDelta))

    def close(self) -> None:
        """Stops counting the generation, and ignores further events."""
        self._is_closed = True
        if self._record is not None:
            self._record.prompt_tokens = self.usage.prompt_tokens
            self._record.generated_tokens = self.usage.generated_tokens
        if self._started:
            self._generations.active -= 1
        else:
            self._generations.queued -= 1
