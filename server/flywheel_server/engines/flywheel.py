"""The flywheel engine: a class on Modal with the method `generate` of MK1 Flywheel.

Each generation is a call that is spawned, awaited and, when its caller has gone, cancelled: cancelling `remote()` would leave
it running. A class that has `generate_deltas` as well, as ours has, sends the text while it is made through a `modal.Queue`:
a generator on Modal could stream it too, but a generator cannot be cancelled.
"""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, aclosing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final, Self, TypeAlias

import modal
import structlog
from pydantic import ValidationError

from flywheel_server.engines import remote_events
from flywheel_server.engines.base import (
    EngineError,
    EngineFailedError,
    EngineModel,
    EngineSetupError,
    EngineStats,
    EngineUnavailableError,
    Event,
    Started,
)
from flywheel_server.engines.modal_errors import Target, as_engine_errors
from flywheel_server.engines.samples import StopGate
from flywheel_server.messages import GenerationRequest, GenerationResponse, GenerationResponseSample

log = structlog.stdlib.get_logger(__name__)

MAX_PILES: Final = 100
"""How many piles of events one read of the queue brings at most."""

QUEUE_GRACE: Final = 10.0
"""Seconds for the rest of the events to come out of the queue once the call that put them there has returned."""

CLEAN_UP_INTERVAL: Final = 1.0
"""Seconds between two tries to cancel what is to be cancelled, while Modal cannot be reached."""

STOP_GRACE: Final = 5.0
"""Seconds for the cancels that are under way when the engine stops."""


Method: TypeAlias = modal.Function[..., Any, Any]


@dataclass(frozen=True, slots=True)
class _Class:
    """The class as it was found: its methods, as far as it has them, and the queue that brings what `generate_deltas` sends."""

    generate: Method
    generate_deltas: Method | None
    queue: modal.Queue | None


class FlywheelEngine:
    """Calls a class on Modal.

    Arguments:
        target: The class, which is looked up at the first call, and again after a call that did not find it.
        gpu: The GPU for its containers, as Modal names it; empty leaves that to the deployment of the class.
        timeout: The seconds after which Modal ends a call.
        model: What the class runs. Asking it would wake a container that was scaled to zero.
    """

    def __init__(self, target: Target, *, gpu: str, timeout: int, model: EngineModel) -> None:
        self._target = target
        self._gpu = gpu
        self._timeout = timeout
        self._model = model
        self._class: _Class | None = None
        self._looking_up = asyncio.Lock()
        self._queues = AsyncExitStack()
        self._calls: set[RemoteCall] = set()
        self._cleanups: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        for call in self._calls:
            self._clean_up(call.cancel)
        if self._cleanups:
            _, unfinished = await asyncio.wait(self._cleanups, timeout=STOP_GRACE)
            for task in unfinished:
                task.cancel()
        with suppress(EngineError), self._translated_errors():
            await self._queues.aclose()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Yields the events of the request; see `Engine.generate`."""
        with self._translated_errors():
            found = await self._found()
            if found.generate_deltas is None or found.queue is None:
                source = self._whole(found.generate, request)
            else:
                source = self._streamed(found.generate_deltas, found.queue, request)
            async with aclosing(source) as events:
                async for event in events:
                    yield event

    async def _whole(self, method: Method, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Yields the samples that the method returns."""
        with self._spawned(method, request.model_dump(mode="json")) as call:
            await call.accepted()
            # Where it waits, for a container or in one, Modal does not tell.
            yield Started()
            for sample in _samples(await call.result(), request.stop):
                yield sample

    async def _streamed(self, method: Method, queue: modal.Queue, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Yields what the method puts into the queue."""
        partition = uuid.uuid4().hex
        unfinished = request.num_samples
        arguments = {"queue": queue, "partition": partition, **request.model_dump(mode="json")}
        try:
            with self._spawned(method, arguments) as call:
                async with aclosing(_once(_events(call, queue, partition))) as events:
                    async for event in events:
                        unfinished -= isinstance(event, GenerationResponseSample)
                        if unfinished == 0:
                            call.has_ended()
                        yield event
                        if unfinished == 0:
                            return
        finally:
            if unfinished:
                self._clean_up(lambda: queue.clear.aio(partition=partition))

    @contextmanager
    def _spawned(self, method: Method, arguments: dict[str, Any]) -> Iterator["RemoteCall"]:
        """Gives a call with these arguments; leaving the context cancels it unless it has ended."""
        call = RemoteCall(method, arguments, self._translated_errors)
        self._calls.add(call)
        try:
            yield call
        finally:
            self._calls.discard(call)
            self._clean_up(call.cancel)

    def _clean_up(self, work: Callable[[], Awaitable[None]]) -> None:
        """Does what nobody waits for, so that a caller who has gone is let go at once.

        As long as Modal cannot be reached, it is tried again: by the time it could end a call by itself, there is no need.
        """

        async def clean_up() -> None:
            given_up = asyncio.get_running_loop().time() + self._timeout
            while True:
                try:
                    with self._translated_errors():
                        return await work()
                except EngineUnavailableError as error:
                    if asyncio.get_running_loop().time() > given_up:
                        log.warning("clean-up on Modal given up", error=str(error))
                        return None
                except EngineError as error:
                    log.warning("clean-up on Modal failed", error=str(error))
                    return None
                await asyncio.sleep(CLEAN_UP_INTERVAL)

        task = asyncio.create_task(clean_up())
        self._cleanups.add(task)
        task.add_done_callback(self._cleanups.discard)

    @contextmanager
    def _translated_errors(self) -> Iterator[None]:
        try:
            with as_engine_errors(self._target, self._timeout):
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

    async def _look_up(self) -> _Class:
        environment = self._target.environment or None
        found = modal.Cls.from_name(self._target.app, self._target.class_name, environment_name=environment)
        await found.hydrate.aio()
        options: dict[str, Any] = {"gpu": self._gpu} if self._gpu else {}
        instance = found.with_options(timeout=self._timeout, **options)()
        generate = await instance.generate.hydrate.aio()
        try:
            generate_deltas = await instance.generate_deltas.hydrate.aio()
        except modal.exception.NotFoundError:
            return _Class(generate, None, None)
        queue = await self._queues.enter_async_context(modal.Queue.ephemeral(environment_name=environment))
        return _Class(generate, generate_deltas, queue)

    async def check(self) -> None:
        """Returns: a call would wake a container, which bills for its time, for nothing."""

    async def stats(self) -> EngineStats:
        """Returns what Modal says of the class; see `Engine.stats`."""
        with self._translated_errors():
            stats = await (await self._found()).generate.get_current_stats.aio()
        return EngineStats(backlog=stats.backlog, num_total_runners=stats.num_total_runners)

    def model(self) -> EngineModel:
        """Returns what the settings say."""
        return self._model


class RemoteCall:
    """One call of a method on Modal."""

    def __init__(
        self, method: Method, arguments: dict[str, Any], translated_errors: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._translated_errors = translated_errors
        # A task of its own: cancelled half way, it might leave a call behind that nobody knows.
        self._spawning = asyncio.ensure_future(method.spawn.aio(**arguments))
        self._ended = False

    async def accepted(self) -> "modal.FunctionCall[Any]":
        """Returns the call on Modal, once Modal has accepted it."""
        return await asyncio.shield(self._spawning)

    async def result(self) -> Any:  # noqa: ANN401 - what has come is to be found out
        """Returns what the method returned; raises what became of it as an error of `engines.base`."""
        # Here, before a task is left by it: what a method raises may be a SystemExit, which would end the event loop.
        with self._translated_errors():
            result = await (await self.accepted()).get.aio()
        self._ended = True
        return result

    def has_ended(self) -> None:
        """Says that the method has nothing left to do."""
        self._ended = True

    async def cancel(self) -> None:
        """Cancels the call on Modal unless it has ended. It may be tried again where that fails."""
        if self._ended:
            return
        try:
            call = await self.accepted()
        except Exception:  # noqa: BLE001 - whoever spawned it was told, and there is no call
            return
        await call.cancel.aio()
        self._ended = True


async def _once(events: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
    """Passes the events on, as long as they are of one attempt.

    When Modal loses a container, it runs the calls in it again in another one. Nobody notices as long as nothing was sent;
    after that, the text would begin anew, and differ.
    """
    started = sent = False
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Started):
                if sent:
                    raise EngineUnavailableError("Modal lost the container, and began the call anew in another one")
                if started:
                    continue
                started = True
            else:
                sent = True
            yield event


async def _events(call: RemoteCall, queue: modal.Queue, partition: str) -> AsyncGenerator[Event, None]:
    """Yields what the call puts into its partition of the queue; raises what becomes of the call."""
    returned = asyncio.ensure_future(call.result())
    read: asyncio.Future[list[Any]] | None = None
    try:
        while True:
            read = asyncio.ensure_future(queue.get_many.aio(MAX_PILES, partition=partition))
            await asyncio.wait((read, returned), return_when=asyncio.FIRST_COMPLETED)
            if not read.done():
                await returned
                # Whatever it has sent was in the queue before it returned.
                await asyncio.wait((read,), timeout=QUEUE_GRACE)
            if not read.done():
                raise EngineFailedError("the class returned before it had sent all samples")
            for pile in await read:
                for event in remote_events.unpack(pile):
                    yield event
    finally:
        pending = [future for future in (returned, read) if future is not None]
        for future in pending:
            future.cancel()
        await asyncio.gather(*pending, return_exceptions=True)


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
