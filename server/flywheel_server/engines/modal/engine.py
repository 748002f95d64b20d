"""The flywheel engine: calls a class on Modal that has the method `generate` of MK1 Flywheel.

For each generation, the engine spawns a call, waits for it, and cancels it if the caller has gone. It does not use `remote()`,
because a cancel of that leaves the call running. If the class also has the method `generate_deltas`, as ours has, it sends the
text through a `modal.Queue` while the text is generated. A generator on Modal could stream too, but cannot be cancelled.
"""

import asyncio
import os
from collections.abc import Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Final, Self, TypeVar

from modal.config import config
from pydantic import BaseModel, ValidationError

from flywheel_server.engines.base import (
    Engine,
    EngineFailedError,
    EngineModel,
    EngineStats,
    EngineUnavailableError,
    PreparedRequest,
    PromptToken,
    Sink,
    Started,
    UnsupportedMethodError,
)
from flywheel_server.engines.modal.cancellations import Cancellations
from flywheel_server.engines.modal.errors import Target, as_engine_errors
from flywheel_server.engines.modal.inbox import Inbox
from flywheel_server.engines.modal.received_events import events_of
from flywheel_server.engines.modal.remote_call import RemoteCall
from flywheel_server.engines.modal.remote_class import RemoteClass
from flywheel_server.engines.modal.remote_fields import arguments_of, further_fields, refuses_trace
from flywheel_server.engines.modal.tokenized_prompt import TokenizedPrompt
from flywheel_server.engines.samples import StopGate
from flywheel_server.messages import GenerationRequest, GenerationResponse, GenerationResponseSample
from flywheel_server.telemetry.trace_context import trace_headers

Answer = TypeVar("Answer", bound=BaseModel)

MAX_CONCURRENT_POLLS: Final = 64
"""How many streaming calls are polled at the same time. Further calls take turns, so their failures may be noticed later."""

STOP_GRACE: Final = 6.0
"""Seconds for which the engine, when it stops, waits for the cancels of its calls."""


class FlywheelEngine(Engine):
    """Calls a class on Modal.

    Arguments:
        target: The class, which is looked up at the first call, and again if Modal refuses to call it.
        gpu: The GPU of its containers, as Modal names it; None leaves the choice to the deployment of the class.
        timeout: Seconds after which Modal ends a call.
        as_deployed: Whether the deployment of the class sets GPU and timeout. If not, they are passed as options, and Modal
            then starts separate containers, instead of using the containers that the deployment keeps warm.
        model: What the class runs. It is not asked, because that would start a container if there is none. The supported fields
            come from the signature that Modal stores. Seeds are not exact: the containers may run on different machines.
    """

    def __init__(self, target: Target, *, gpu: str | None, timeout: int, as_deployed: bool, model: EngineModel) -> None:
        options: dict[str, Any] = {"timeout": timeout, **({"gpu": gpu} if gpu else {})}
        self._timeout = timeout
        self._model = model
        self._errors = partial(as_engine_errors, target, timeout)
        self._class = RemoteClass(target, None if as_deployed else options, self._errors)
        self._poll_slots = asyncio.Semaphore(MAX_CONCURRENT_POLLS)
        self._inbox = Inbox(target.environment, self._errors)
        self._calls: set[RemoteCall] = set()
        self._cancellations = Cancellations(timeout)

    async def __aenter__(self) -> Self:
        if config.get("max_throttle_wait") is None:
            # By default, Modal's client waits as long as Modal limits its requests, and callers get no error.
            os.environ["MODAL_MAX_THROTTLE_WAIT"] = "0"
        return self

    async def __aexit__(self, *exception: object) -> None:
        for call in self._calls:
            self._cancellations.add(call)
        await self._cancellations.stop(STOP_GRACE)
        await self._class.close()
        await self._inbox.close()

    async def prepare(self, request: GenerationRequest) -> PreparedRequest:
        """Returns the request as it is; see `Engine.prepare`. The class tokenizes the prompt."""
        return PreparedRequest(request)

    async def generate(self, prepared: PreparedRequest, sink: Sink) -> None:
        """Emits the events of the request; see `Engine.generate`."""
        request = prepared.request
        if (await self._class.methods_for(request)).generate_deltas is None:
            await self._generate_whole(request, sink)
        else:
            await self._generate_streamed(request, sink)

    async def _generate_whole(self, request: GenerationRequest, sink: Sink) -> None:
        """Emits the samples that the method `generate` returns."""
        with self._spawned("generate", request) as call:
            await call.accepted()
            # Modal does not tell when the class begins to work on the call, so the accepted call counts as started.
            sink.emit(Started())
            for sample in _samples(await call.result(), request.stop):
                sink.emit(sample)

    async def _generate_streamed(self, request: GenerationRequest, sink: Sink) -> None:
        """Emits what the method `generate_deltas` sends to the inbox."""
        unfinished = request.num_samples
        async with self._inbox.receiving() as (address, received):
            with self._spawned("generate_deltas", request, address) as call:
                async with aclosing(events_of(call, received, self._poll_slots)) as events:
                    async for event in events:
                        # This raises if the event may not come next. `call.ended` is still False then: the call is cancelled.
                        sink.emit(event)
                        unfinished -= isinstance(event, GenerationResponseSample)
                        if unfinished == 0:
                            # The call has nothing to do after its last sample, so it need not be cancelled.
                            call.ended = True
                            return

    async def tokenize(self, prepared: PreparedRequest) -> Sequence[PromptToken]:
        """Returns the tokens of the prompt, which the method `tokenize` of the class returns; see `Engine.tokenize`."""
        request = prepared.request
        if (await self._class.methods_for(request)).tokenize is None:
            raise UnsupportedMethodError("Tokenize")
        with self._spawned("tokenize", request) as call:
            return _valid(TokenizedPrompt, await call.result()).tokens

    @contextmanager
    def _spawned(self, method: str, request: GenerationRequest, address: dict[str, Any] | None = None) -> Iterator[RemoteCall]:
        """Yields a call for the request. When the context ends, the call is cancelled unless it has ended."""
        errors = partial(self._errors, sent=further_fields(request))
        arguments = {**(address or {}), **arguments_of(request)}
        call = RemoteCall(self._class.spawn(method, arguments, trace_headers()), errors, self._timeout)
        self._calls.add(call)
        try:
            yield call
        except EngineUnavailableError as error:
            if refuses_trace(error.__cause__):
                self._class.look_up_again()
            raise
        finally:
            self._calls.discard(call)
            self._cancellations.add(call)

    async def check(self) -> None:
        """Does nothing: a call would start a container, which costs money, only for this check."""

    async def stats(self) -> EngineStats:
        """Returns how busy the class is, according to Modal; see `Engine.stats`."""
        return await self._class.stats()

    def is_reachable(self) -> bool:
        """Returns whether recent requests could reach the class; see `Engine.is_reachable`."""
        return self._class.is_reachable()

    def model(self) -> EngineModel:
        """Returns the model that the settings name, with the fields that the class took when it was looked up last."""
        fields = self._class.supported_fields
        if fields != self._model.supported_fields:
            self._model = replace(self._model, supported_fields=fields)
        return self._model


def _samples(answer: Any, stop: Sequence[str]) -> Iterator[GenerationResponseSample]:  # noqa: ANN401 - validated here
    """Yields the samples that `generate` returned; raises `EngineFailedError` if the answer is not valid.

    MK1's samples have no index, so their position counts. A stop sequence in a text is cut off, with all that follows, and
    named. If the class has cut it off already without naming it, its name stays unknown.
    """
    response = _valid(GenerationResponse, answer)
    for index, sample in enumerate(response.responses):
        gate = StopGate(stop)
        text = gate.feed(sample.text)
        cut = {"text": text, "finish_reason": "stop", "stop_sequence": gate.matched} if gate.matched else {}
        prompt_tokens = sample.prompt_tokens or response.prompt_tokens
        yield sample.model_copy(update={"index": index, "prompt_tokens": prompt_tokens, **cut})


def _valid(kind: type[Answer], answer: Any) -> Answer:  # noqa: ANN401 - validated here
    """Returns what a method of the class returned; raises `EngineFailedError` if it is not of this kind."""
    try:
        return kind.model_validate(answer)
    except ValidationError as error:
        # The message leaves out the input, which contains text of the caller.
        problems = error.errors(include_url=False, include_input=False, include_context=False)
        raise EngineFailedError(f"the class returned what is no {kind.__name__}: {problems}") from None
