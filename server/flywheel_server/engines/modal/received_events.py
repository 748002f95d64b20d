"""The events of one call on Modal, brought into order from what arrives in piles."""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from typing import Any, Final

from pydantic import ValidationError

from flywheel_server.engines.base import EngineFailedError, EngineUnavailableError, Event, Started
from flywheel_server.engines.modal.event_batch import EventBatch, Receipt
from flywheel_server.engines.modal.remote_call import RemoteCall

LAST_EVENTS_TIMEOUT: Final = 10.0
"""Seconds of working reads for the rest of the events to arrive once the call that sent them has returned."""

MAX_SILENCE: Final = 30.0
"""Seconds of working reads without a sign of life after which a container counts as lost.

It sends one every 3 s. It may be kept from that by a limit of Modal's for some seconds, or by one request to Modal whose answer
does not come, for which it waits `ANSWER_SECONDS` of `deployment.outbox`.
"""


class ReceivedEvents:
    """What has arrived for a call: events in their order, each once, and what ended the call.

    When Modal loses a container, it runs the calls in it again in another one. Nobody notices as long as nothing was sent;
    after that, the text would begin anew, and differ.
    """

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._error: BaseException | None = None
        self._changed = asyncio.Event()
        self._received = 0
        self._attempt = ""
        self._abandoned: set[str] = set()
        self._started = False
        self._container = ""
        """The one that has sent text, as far as it said."""
        self._text_came = False
        self._receipt: Receipt | None = None
        self._returned_at: float | None = None
        self.call_failed = asyncio.Event()
        """Set if the class says that the call has failed there."""

    def add(self, pile: EventBatch) -> None:
        """Takes in the events of the pile that are news.

        A pile that came before is dropped: a put whose answer was lost is repeated, though its items may have been stored.
        """
        if pile.attempt in self._abandoned:
            return
        if pile.attempt != self._attempt:
            if self._text_came:
                self.fail(EngineUnavailableError("Modal lost the container, and began the call anew in another one"))
                return
            self._abandoned.add(self._attempt)
            self._attempt = pile.attempt
            self._received = 0
        if pile.number > self._received:
            self.fail(EngineUnavailableError("Modal lost events of the call"))
        elif pile.number == self._received:
            self._received += 1
            self._add_news(pile)

    def _add_news(self, pile: EventBatch) -> None:
        news = [event for event in pile.events if not (self._started and isinstance(event, Started))]
        self._started = self._started or bool(pile.events)
        if any(not isinstance(event, Started) for event in news):
            self._text_came = True
            self._container = pile.container
        if pile.ended:
            self.call_failed.set()
        self._events.extend(news)
        self._changed.set()

    def fail(self, error: BaseException) -> None:
        """Ends the call with the error, after the events that have arrived."""
        self._error = self._error or error
        self._changed.set()

    def leave(self, container: str) -> None:
        """Ends the call if its text came from the container, which is about to end."""
        if container and container == self._container:
            self.fail(EngineUnavailableError("Modal ends the container that works on the call"))

    def returned(self, value: Any) -> None:  # noqa: ANN401 - what has come is to be found out
        """Takes in what the method returned."""
        try:
            self._receipt = Receipt.model_validate(value)
        except ValidationError:
            self.fail(EngineFailedError("the class returned what is no receipt"))
        self._changed.set()

    def check(self, clock: float, heard: Mapping[str, float]) -> None:
        """Ends the call if what it waits for can no longer come.

        `clock` is in seconds, and stands still while the queue cannot be read. `heard` says of each container when, by that
        clock, its last sign of life came.
        """
        if self._container and clock - heard.get(self._container, clock) > MAX_SILENCE:
            self.fail(EngineUnavailableError("the container that works on the call is silent"))
        if self._receipt is not None and not self._has_all():
            if self._returned_at is None:
                self._returned_at = clock
            elif clock - self._returned_at > LAST_EVENTS_TIMEOUT:
                self.fail(EngineUnavailableError("Modal lost the last events of the call"))

    async def take(self) -> list[Event]:
        """Returns the events since the last time, once there are some; raises what ended the call."""
        while not self._events:
            if self._error is not None:
                raise self._error
            if self._has_all():
                raise EngineFailedError("the class returned before all samples had finished")
            self._changed.clear()
            await self._changed.wait()
        events, self._events = self._events, []
        return events

    def _has_all(self) -> bool:
        receipt = self._receipt
        return receipt is not None and (self._attempt, self._received) == (receipt.attempt, receipt.piles)


async def events_of(call: RemoteCall, arrivals: ReceivedEvents, watchers: asyncio.Semaphore) -> AsyncGenerator[Event, None]:
    """Yields the events that arrive from the call; raises what becomes of it. Stop reading after the last sample."""

    def end(watch: asyncio.Task[Any]) -> None:
        if watch.cancelled():
            return
        if error := watch.exception():
            arrivals.fail(error)
        else:
            arrivals.returned(watch.result())

    async def ask_when_it_failed() -> Any:  # noqa: ANN401 - what has come is to be found out
        """Returns or raises what `result` does, out of turn."""
        await arrivals.call_failed.wait()
        return await call.result()

    watches = [asyncio.create_task(call.watched(watchers)), asyncio.create_task(ask_when_it_failed())]
    for watch in watches:
        watch.add_done_callback(end)
    try:
        while True:
            events = await arrivals.take()
            call.heard()
            for event in events:
                yield event
    finally:
        for watch in watches:
            watch.cancel()
        await asyncio.gather(*watches, return_exceptions=True)
