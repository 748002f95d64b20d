"""The events of one call on Modal, put back into order from the batches that arrive."""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from typing import Any, Final

from pydantic import ValidationError

from flywheel_server.engines.base import EngineFailedError, EngineUnavailableError, Event, Started, TextDelta
from flywheel_server.engines.modal.event_batch import EventBatch, Receipt
from flywheel_server.engines.modal.remote_call import RemoteCall
from flywheel_server.engines.modal.waits import cancel_and_wait
from flywheel_server.messages import GenerationResponseSample, Token

LAST_EVENTS_TIMEOUT: Final = 10.0
"""Seconds for the last events to arrive after the call has returned. Only time in which the queue can be read counts."""

MAX_SILENCE: Final = 30.0
"""Seconds without a batch or heartbeat after which a container counts as lost. Only time in which the queue can be read counts.

A container sends a heartbeat every 3 s. A rate limit of Modal's may delay it by some seconds, and so may one request that Modal
does not answer: the container waits for it for `PUT_ATTEMPT_TIMEOUT` of `deployment.outbox`.
"""


class ReceivedEvents:
    """Collects what arrives for a call: its events, each once and in order, and the error that ends the call.

    If Modal loses a container, it runs the container's calls again in another one (a new attempt). As long as no text has
    arrived, the new attempt replaces the old one. After that, the text would start again and differ, so the call fails.

    Attributes:
        call_failed: Set if the container says that the call has failed there.
    """

    def __init__(self) -> None:
        self.call_failed = asyncio.Event()
        self._events: list[Event] = []
        self._error: BaseException | None = None
        self._changed = asyncio.Event()
        self._tokens: dict[int, list[Token]] = {}
        """By index: the tokens that have arrived with the deltas of a sample that has not finished."""
        self._attempt = ""
        self._abandoned_attempts: set[str] = set()
        self._received_batches = 0
        """How many batches of the current attempt have arrived."""
        self._has_started = False
        self._has_text = False
        self._container = ""
        """The container that has sent text; empty if there is none yet, or it has no id."""
        self._receipt: Receipt | None = None
        self._returned_at: float | None = None

    def add(self, batch: EventBatch) -> None:
        """Takes the events of the batch, unless the same batch has arrived before.

        A batch arrives twice if Modal stored it, but the answer was lost, so that the container sent it again.
        """
        if batch.attempt in self._abandoned_attempts:
            return
        if batch.attempt != self._attempt:
            if self._has_text:
                self.fail(EngineUnavailableError("Modal lost the container, and began the call anew in another one"))
                return
            self._abandoned_attempts.add(self._attempt)
            self._attempt = batch.attempt
            self._received_batches = 0
        if batch.number > self._received_batches:
            self.fail(EngineUnavailableError("Modal lost events of the call"))
        elif batch.number == self._received_batches:
            self._received_batches += 1
            self._add_events_of(batch)

    def _add_events_of(self, batch: EventBatch) -> None:
        # A second attempt sends Started again.
        events = [event for event in batch.events if not (self._has_started and isinstance(event, Started))]
        self._has_started = self._has_started or bool(batch.events)
        if any(not isinstance(event, Started) for event in events):
            self._has_text = True
            self._container = batch.container
        if batch.ended:
            self.call_failed.set()
        self._events.extend(map(self._with_all_tokens, events))
        self._changed.set()

    def _with_all_tokens(self, event: Event) -> Event:
        """Returns the event; of a finished sample, with the tokens that its deltas had."""
        if isinstance(event, TextDelta) and event.tokens:
            self._tokens.setdefault(event.index, []).extend(event.tokens)
        elif isinstance(event, GenerationResponseSample) and (tokens := self._tokens.pop(event.index, None)):
            return event.model_copy(update={"tokens": (*tokens, *event.tokens)})
        return event

    def fail(self, error: BaseException) -> None:
        """Ends the call with the error, after the events that have arrived. The first error counts."""
        self._error = self._error or error
        self._changed.set()

    def note_leaving(self, container: str) -> None:
        """Ends the call if its text came from this container, which is about to end."""
        if container and container == self._container:
            self.fail(EngineUnavailableError("Modal ends the container that works on the call"))

    def note_result(self, value: Any) -> None:  # noqa: ANN401 - validated here
        """Takes the result of the method, which is a receipt for all batches."""
        try:
            self._receipt = Receipt.model_validate(value)
        except ValidationError:
            self.fail(EngineFailedError("the class returned what is no receipt"))
        self._changed.set()

    def check(self, clock: float, last_heard: Mapping[str, float]) -> None:
        """Ends the call if its container is silent, or if its last events do not arrive.

        Arguments:
            clock: Seconds, on a clock that stands still while the queue cannot be read.
            last_heard: When the last batch or heartbeat of each container arrived, on that clock.
        """
        if self._container and clock - last_heard.get(self._container, clock) > MAX_SILENCE:
            self.fail(EngineUnavailableError("the container that works on the call is silent"))
        if self._receipt is not None and not self._is_complete():
            if self._returned_at is None:
                self._returned_at = clock
            elif clock - self._returned_at > LAST_EVENTS_TIMEOUT:
                self.fail(EngineUnavailableError("Modal lost the last events of the call"))

    async def take(self) -> list[Event]:
        """Waits for events, and returns those since the last call of this method; raises the error that ended the call."""
        while not self._events:
            if self._error is not None:
                raise self._error
            if self._is_complete():
                raise EngineFailedError("the class returned before all samples had finished")
            self._changed.clear()
            await self._changed.wait()
        events, self._events = self._events, []
        return events

    def _is_complete(self) -> bool:
        receipt = self._receipt
        return receipt is not None and (self._attempt, self._received_batches) == (receipt.attempt, receipt.piles)


async def events_of(call: RemoteCall, received: ReceivedEvents, poll_slots: asyncio.Semaphore) -> AsyncGenerator[Event, None]:
    """Yields the events of the call as they arrive; raises the call's error. Stop reading after the last sample.

    The call is polled at the same time, because a call that fails on Modal may send nothing more.
    """

    def note_end(task: asyncio.Task[Any]) -> None:
        if task.cancelled():
            return
        if error := task.exception():
            received.fail(error)
        else:
            received.note_result(task.result())

    async def result_after_failure() -> Any:  # noqa: ANN401 - the caller validates it
        """Asks for the result at once if the container says that the call has failed."""
        await received.call_failed.wait()
        return await call.result()

    tasks = [asyncio.create_task(call.polled_result(poll_slots)), asyncio.create_task(result_after_failure())]
    for task in tasks:
        task.add_done_callback(note_end)
    try:
        while True:
            events = await received.take()
            call.note_events()
            for event in events:
                yield event
    finally:
        await cancel_and_wait(*tasks)
