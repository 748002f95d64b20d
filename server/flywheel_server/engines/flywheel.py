"""The flywheel engine: a class on Modal with the method `generate` of MK1 Flywheel.

Each generation is a call that is spawned, awaited and, when its caller has gone, cancelled: cancelling `remote()` would leave
it running. A class that has `generate_deltas` as well, as ours has, sends the text while it is made through a `modal.Queue`:
a generator on Modal could stream it too, but a generator cannot be cancelled.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import AsyncExitStack, aclosing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Self

import modal
import structlog
from pydantic import ValidationError

from flywheel_server.engines.base import (
    EngineError,
    EngineFailedError,
    EngineModel,
    EngineSetupError,
    EngineStats,
    EngineUnavailableError,
    Event,
    PreparedRequest,
    Started,
)
from flywheel_server.engines.inbox import Inbox
from flywheel_server.engines.modal_errors import Target, as_engine_errors
from flywheel_server.engines.remote_call import Method, RemoteCall, events_of
from flywheel_server.engines.remote_fields import arguments_of, further_fields, signature_of, unsupported
from flywheel_server.engines.samples import StopGate
from flywheel_server.messages import GenerationRequest, GenerationResponse, GenerationResponseSample

log = structlog.stdlib.get_logger(__name__)

WATCHERS: Final = 64
"""How many calls that stream are looked at at a time: more take turns, and only their failure is noticed later for it."""

CANCEL_INTERVAL: Final = 1.0
"""Seconds between two tries to cancel a call while Modal cannot be reached."""

STOP_GRACE: Final = 3.0
"""Seconds for the cancels that are under way when the engine stops."""


@dataclass(frozen=True, slots=True)
class _Class:
    """The methods of the class as it was found, as far as it has them, and the arguments of the one that generates."""

    generate: Method
    generate_deltas: Method | None
    signature: frozenset[str] | None

    def refused(self, request: GenerationRequest) -> str | None:
        """Returns a field that is set in the request and that the class is known not to take; None if there is none."""
        return next((name for name in further_fields(request) if self.signature and name not in self.signature), None)


class FlywheelEngine:
    """Calls a class on Modal.

    Arguments:
        target: The class, which is looked up at the first call, and again after a call that did not find it.
        gpu: The GPU for its containers, as Modal names it; empty leaves that to the deployment of the class.
        timeout: The seconds after which Modal ends a call.
        as_deployed: Whether both are those of its deployment already. Modal gives a class with options of ours containers of
            their own, apart from those that its deployment keeps warm.
        model: What the class runs. Asking it would wake a container that was scaled to zero.
    """

    def __init__(self, target: Target, *, gpu: str, timeout: int, as_deployed: bool, model: EngineModel) -> None:
        self._target = target
        self._gpu = gpu
        self._timeout = timeout
        self._as_deployed = as_deployed
        self._model = model
        self._errors = partial(as_engine_errors, target, timeout)
        self._watchers = asyncio.Semaphore(WATCHERS)
        self._class: _Class | None = None
        self._looking_up = asyncio.Lock()
        self._inbox: Inbox | None = None
        self._queue = AsyncExitStack()
        self._calls: set[RemoteCall] = set()
        self._cancels: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        for call in self._calls:
            self._cancel(call)
        if self._cancels:
            _, unfinished = await asyncio.wait(self._cancels, timeout=STOP_GRACE)
            for task in unfinished:
                task.cancel()
        await self._close_inbox()

    async def prepare(self, request: GenerationRequest) -> PreparedRequest:
        """Returns the request as it is; see `Engine.prepare`. The class tokenizes its prompt."""
        return PreparedRequest(request)

    async def generate(self, prepared: PreparedRequest) -> AsyncGenerator[Event, None]:
        """Yields the events of the request; see `Engine.generate`."""
        request = prepared.request
        with self._forgetting():
            found = await self._found_for(request)
            if found.generate_deltas is None:
                source = self._whole(found.generate, request)
            else:
                source = self._streamed(found.generate_deltas, await self._open_inbox(), request)
            async with aclosing(source) as events:
                async for event in events:
                    yield event

    async def _whole(self, method: Method, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Yields the samples that the method returns."""
        with self._spawned(method, request) as call:
            await call.accepted()
            # Where it waits, for a container or in one, Modal does not tell.
            yield Started()
            for sample in _samples(await call.result(), request.stop):
                yield sample

    async def _streamed(self, method: Method, inbox: Inbox, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Yields what the method sends to the inbox."""
        unfinished = request.num_samples
        with inbox.receiving() as (call_id, arrivals):
            sender = {"queue": inbox.queue, "partition": inbox.partition, "call": call_id}
            with self._spawned(method, request, sender) as call:
                async with aclosing(events_of(call, arrivals, self._watchers)) as events:
                    async for event in events:
                        unfinished -= isinstance(event, GenerationResponseSample)
                        # Whatever it does after its last sample, there is nothing left to cancel.
                        call.ended = unfinished == 0
                        yield event
                        if unfinished == 0:
                            return

    @contextmanager
    def _spawned(
        self, method: Method, request: GenerationRequest, sender: dict[str, Any] | None = None
    ) -> Iterator["RemoteCall"]:
        """Gives a call for the request; leaving the context cancels it unless it has ended."""
        errors = partial(self._errors, sent=further_fields(request))
        call = RemoteCall(method, {**(sender or {}), **arguments_of(request)}, errors)
        self._calls.add(call)
        try:
            yield call
        finally:
            self._calls.discard(call)
            if not call.ended:
                self._cancel(call)

    def _cancel(self, call: "RemoteCall") -> None:
        """Cancels the call without waiting for it, so that a caller who has gone is let go at once."""
        task = asyncio.create_task(self._cancelled(call))
        self._cancels.add(task)
        task.add_done_callback(self._cancels.discard)

    async def _cancelled(self, call: "RemoteCall") -> None:
        """Tries until Modal can be reached, or would have ended the call by itself."""
        given_up = asyncio.get_running_loop().time() + self._timeout
        while asyncio.get_running_loop().time() < given_up:
            try:
                return await call.cancel()
            except EngineUnavailableError:
                await asyncio.sleep(CANCEL_INTERVAL)
            except EngineError as error:
                log.warning("call not cancelled", error=str(error))
                return None
        log.warning("call not cancelled", error="Modal cannot be reached")
        return None

    @contextmanager
    def _forgetting(self) -> Iterator[None]:
        try:
            with self._errors():
                yield
        except EngineSetupError:
            # It may have been deployed anew, or be gone: the next call looks.
            self._class = None
            raise

    async def _found(self) -> _Class:
        async with self._looking_up:
            if self._class is None:
                self._class = await self._look_up()
            return self._class

    async def _found_for(self, request: GenerationRequest) -> _Class:
        """Returns the class; raises `UnsupportedFieldError` if it is known not to take a field of the request."""
        found = await self._found()
        if found.refused(request):
            # It may have been deployed anew since it was found.
            self._class = None
            found = await self._found()
        if field := found.refused(request):
            raise unsupported(field)
        return found

    async def _look_up(self) -> _Class:
        environment = self._target.environment or None
        found = modal.Cls.from_name(self._target.app, self._target.class_name, environment_name=environment)
        await found.hydrate.aio()
        if not self._as_deployed:
            options: dict[str, Any] = {"gpu": self._gpu} if self._gpu else {}
            found = found.with_options(timeout=self._timeout, **options)
        instance = found()
        generate = await instance.generate.hydrate.aio()
        try:
            generate_deltas = await instance.generate_deltas.hydrate.aio()
        except modal.exception.NotFoundError:
            return _Class(generate, None, await signature_of(generate))
        return _Class(generate, generate_deltas, await signature_of(generate_deltas))

    async def _open_inbox(self) -> Inbox:
        async with self._looking_up:
            if self._inbox is None or not self._inbox.reads:
                await self._close_inbox()
                queue = modal.Queue.ephemeral(environment_name=self._target.environment or None)
                self._inbox = Inbox(await self._queue.enter_async_context(queue), self._errors)
            return self._inbox

    async def _close_inbox(self) -> None:
        if self._inbox is not None:
            await self._inbox.close()
        with suppress(EngineError), self._errors():
            await self._queue.aclose()

    async def check(self) -> None:
        """Returns: a call would wake a container, which bills for its time, for nothing."""

    async def stats(self) -> EngineStats:
        """Returns what Modal says of the class; see `Engine.stats`."""
        with self._forgetting():
            stats = await (await self._found()).generate.get_current_stats.aio()
        return EngineStats(backlog=stats.backlog, num_total_runners=stats.num_total_runners)

    def model(self) -> EngineModel:
        """Returns what the settings say."""
        return self._model


def _samples(answer: Any, stop: Sequence[str]) -> Iterator[GenerationResponseSample]:  # noqa: ANN401 - to be found out
    """Yields the samples of what `generate` returned, or raises `EngineFailedError`.

    Flywheel's samples do not say their index, which is their position, nor which stop sequence ended them if they leave it out.
    """
    try:
        response = GenerationResponse.model_validate(answer)
    except ValidationError as error:
        # Without the input, which holds text of the model.
        problems = error.errors(include_url=False, include_input=False, include_context=False)
        raise EngineFailedError(f"the class returned what is no GenerationResponse: {problems}") from None
    for index, sample in enumerate(response.responses):
        gate = StopGate(stop)
        text = gate.feed(sample.text)
        ending = {"finish_reason": "stop", "stop_sequence": gate.matched} if gate.matched else {}
        yield sample.model_copy(
            update={
                "index": index,
                "text": text if gate.matched else sample.text,
                "prompt_tokens": sample.prompt_tokens or response.prompt_tokens,
                **ending,
            }
        )
