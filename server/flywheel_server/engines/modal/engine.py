"""The flywheel engine: a class on Modal with the method `generate` of MK1 Flywheel.

Each generation is a call that is spawned, awaited and, when its caller has gone, cancelled: cancelling `remote()` would leave
it running. A class that has `generate_deltas` as well, as ours has, sends the text while it is made through a `modal.Queue`:
a generator on Modal could stream it too, but a generator cannot be cancelled.
"""

import asyncio
import os
from collections.abc import Iterator, Sequence
from contextlib import aclosing, contextmanager
from functools import partial
from typing import Any, Final, Self

from modal.config import config
from pydantic import ValidationError

from flywheel_server.engines.base import (
    EngineFailedError,
    EngineModel,
    EngineStats,
    PreparedRequest,
    Sink,
    Started,
)
from flywheel_server.engines.modal.cancellations import Cancellations
from flywheel_server.engines.modal.errors import Target, as_engine_errors
from flywheel_server.engines.modal.inbox import Inbox
from flywheel_server.engines.modal.received_events import events_of
from flywheel_server.engines.modal.remote_call import RemoteCall
from flywheel_server.engines.modal.remote_class import RemoteClass
from flywheel_server.engines.modal.remote_fields import arguments_of, further_fields
from flywheel_server.engines.samples import StopGate
from flywheel_server.messages import GenerationRequest, GenerationResponse, GenerationResponseSample

MAX_CONCURRENT_POLLS: Final = 64
"""How many calls that stream are looked at at a time: more take turns, and only their failure is noticed later for it."""

STOP_GRACE: Final = 6.0
"""Seconds for the cancels that are under way when the engine stops."""


class FlywheelEngine:
    """Calls a class on Modal.

    Arguments:
        target: The class, which is looked up at the first call, and again after a call that did not find it.
        gpu: The GPU for its containers, as Modal names it; None leaves that to the deployment of the class.
        timeout: The seconds after which Modal ends a call.
        as_deployed: Whether both are those of its deployment already. Modal gives a class with options of ours containers of
            their own, apart from those that its deployment keeps warm.
        model: What the class runs. Asking it would wake a container that was scaled to zero.
    """

    def __init__(self, target: Target, *, gpu: str | None, timeout: int, as_deployed: bool, model: EngineModel) -> None:
        options: dict[str, Any] = {"timeout": timeout, **({"gpu": gpu} if gpu else {})}
        self._target = target
        self._timeout = timeout
        self._model = model
        self._errors = partial(as_engine_errors, target, timeout)
        self._class = RemoteClass(target, None if as_deployed else options, self._errors)
        self._watchers = asyncio.Semaphore(MAX_CONCURRENT_POLLS)
        self._inbox = Inbox(target.environment, self._errors)
        self._calls: set[RemoteCall] = set()
        self._cancels = Cancellations(timeout)

    async def __aenter__(self) -> Self:
        if config.get("max_throttle_wait") is None:
            # By default, Modal's client waits for as long as Modal limits its requests, and callers learn nothing.
            os.environ["MODAL_MAX_THROTTLE_WAIT"] = "0"
        return self

    async def __aexit__(self, *exception: object) -> None:
        for call in self._calls:
            self._cancels.add(call)
        await self._cancels.stop(STOP_GRACE)
        await self._class.close()
        await self._inbox.close()

    async def prepare(self, request: GenerationRequest) -> PreparedRequest:
        """Returns the request as it is; see `Engine.prepare`. The class tokenizes its prompt."""
        return PreparedRequest(request)

    async def generate(self, prepared: PreparedRequest, sink: Sink) -> None:
        """Emits the events of the request; see `Engine.generate`."""
        request = prepared.request
        methods = await self._class.methods_for(request)
        if methods.generate_deltas is None:
            await self._whole(request, sink)
        else:
            await self._streamed(request, sink)

    async def _whole(self, request: GenerationRequest, sink: Sink) -> None:
        """Emits the samples that the method `generate` returns."""
        with self._spawned("generate", request) as call:
            await call.accepted()
            # Where it waits, for a container or in one, Modal does not tell.
            sink.emit(Started())
            for sample in _samples(await call.result(), request.stop):
                sink.emit(sample)

    async def _streamed(self, request: GenerationRequest, sink: Sink) -> None:
        """Emits what the method `generate_deltas` sends to the inbox."""
        unfinished = request.num_samples
        async with self._inbox.receiving() as (address, arrivals):
            with self._spawned("generate_deltas", request, address) as call:
                async with aclosing(events_of(call, arrivals, self._watchers)) as events:
                    async for event in events:
                        # First, as it raises if the event is not one that may come: then the call is to be cancelled.
                        sink.emit(event)
                        unfinished -= isinstance(event, GenerationResponseSample)
                        if unfinished == 0:
                            # Whatever it does after its last sample, there is nothing left to cancel.
                            call.ended = True
                            return

    @contextmanager
    def _spawned(self, method: str, request: GenerationRequest, address: dict[str, Any] | None = None) -> Iterator[RemoteCall]:
        """Gives a call for the request; leaving the context cancels it unless it has ended."""
        errors = partial(self._errors, sent=further_fields(request))
        arguments = {**(address or {}), **arguments_of(request)}
        call = RemoteCall(self._class.spawn(method, arguments), errors, self._timeout)
        self._calls.add(call)
        try:
            yield call
        finally:
            self._calls.discard(call)
            self._cancels.add(call)

    async def check(self) -> None:
        """Returns: a call would wake a container, which bills for its time, for nothing."""

    async def stats(self) -> EngineStats:
        """Returns what Modal says of the class; see `Engine.stats`."""
        return await self._class.stats()

    def is_reachable(self) -> bool:
        """Returns whether the class was found or called lately; see `Engine.is_reachable`."""
        return self._class.is_reachable()

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
