"""Handles one worker's messages about its calls, in the parent."""

import asyncio
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

from flywheel_server.access.callers import Caller
from flywheel_server.access.quotas import Quotas
from flywheel_server.admission import Admission, Place
from flywheel_server.workers import wire
from flywheel_server.workers.wire import Connection


class SharedCalls:
    """Reserves quota and places in the queue for a worker's calls, and releases both. Releases all when the worker is gone.

    Arguments:
        quotas: The quotas of all workers.
        admission: The admission of all workers.
        worker: The connection to the worker, which gets the answers.

    Attributes:
        handlers: The function to call for each kind of message about a call.
    """

    def __init__(self, quotas: Quotas, admission: Admission, worker: Connection) -> None:
        self._quotas = quotas
        self._admission = admission
        self._worker = worker
        self._places: dict[int, Place] = {}
        self._reservations: dict[int, Callable[[int], None]] = {}
        """For each call that has reserved quota: the function that settles the reservation with the tokens used."""
        self._entries: dict[int, asyncio.Handle] = {}
        """For each call that has arrived and not yet entered: the scheduled `_enter`."""
        self.handlers: Final[dict[str, Callable[..., None]]] = {
            "enter": self.enter,
            "admit": self.admit,
            "confirm": self.confirm,
            "leave": self.leave,
            "settle": self.settle,
        }

    def enter(self, number: int, *entry: Any) -> None:  # noqa: ANN401 - the arguments of `_enter`, as they come over the wire
        """Schedules `_enter`, to run after all messages that have arrived by now.

        The caller may have started this call because its call on another worker ended. The event loop may read the message
        about the new call before the message about the call that ended.
        """
        self._entries[number] = asyncio.get_running_loop().call_soon(self._enter, number, *entry)

    def _enter(  # noqa: PLR0917 - as they come over the wire
        self,
        number: int,
        caller_fields: Mapping[str, Any],
        samples: int,
        tokens: int,
        time_remaining: float | None,
        context_tokens: int | None = None,
    ) -> None:
        """Reserves quota and a place in the queue for a new call. The call waits for slots if its prompt is ready."""
        del self._entries[number]
        caller = Caller(**caller_fields)
        try:
            reserved = self._quotas.reserve(caller, samples, tokens)
            self._reservations[number] = lambda used: self._quotas.settle(caller, samples, reserved - used)
            place = self._admission.join(samples, caller, time_remaining)
        except wire.REFUSALS as error:
            self._refuse(number, error)
            return
        self._places[number] = place
        place.call_if_evicted(partial(self._lose, number))
        if context_tokens is not None:
            self._admit(number, context_tokens, time_remaining)

    def admit(self, number: int, context_tokens: int, time_remaining: float | None) -> None:
        """Makes a call wait for slots, unless it has been refused. Scheduled, so that it runs after `_enter`."""
        asyncio.get_running_loop().call_soon(self._admit, number, context_tokens, time_remaining)

    def _admit(self, number: int, context_tokens: int, time_remaining: float | None) -> None:
        if place := self._places.get(number):
            try:
                place.request(context_tokens, time_remaining, partial(self._worker.send, "admitted", number))
            except wire.REFUSALS as error:
                self._refuse(number, error)

    def confirm(self, number: int) -> None:
        """Tells the worker that a call has entered, unless it has been refused. Scheduled, so that it runs after `_enter`."""
        asyncio.get_running_loop().call_soon(self._confirm, number)

    def _confirm(self, number: int) -> None:
        if number in self._places:
            self._worker.send("admitted", number)

    def leave(self, number: int, finished: bool, used_tokens: int | None) -> None:
        """Releases the place or the slots of a call, and settles its reservation if the number of used tokens is known."""
        if entry := self._entries.pop(number, None):
            entry.cancel()
        if place := self._places.pop(number, None):
            place.release(finished=finished)
        if used_tokens is not None:
            self.settle(number, used_tokens)

    def settle(self, number: int, used_tokens: int) -> None:
        """Settles a call's reservation: gives back the quota, except for the tokens used."""
        if settle := self._reservations.pop(number, None):
            settle(used_tokens)

    def release_all(self) -> None:
        """Releases everything that the calls hold. Their used tokens are unknown, and do not count, as after a restart."""
        for number in [*self._entries, *self._places]:
            self.leave(number, False, None)
        for number in list(self._reservations):
            self.settle(number, 0)

    def _lose(self, number: int, error: Exception) -> None:
        # Scheduled, because the admission is just now giving the place to another call.
        asyncio.get_running_loop().call_soon(self._refuse, number, error)

    def _refuse(self, number: int, error: Exception) -> None:
        # The reservation stays until the worker reports the tokens used: the prompt may have been read.
        self.leave(number, False, None)
        self._worker.send("refused", number, wire.from_error(error))
