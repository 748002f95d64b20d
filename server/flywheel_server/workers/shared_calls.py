"""What the calls of one worker hold of the admission of all."""

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from flywheel_server.access.quotas import Quotas
from flywheel_server.admission import Admission, Place
from flywheel_server.workers import wire
from flywheel_server.workers.wire import Connection, Line

if TYPE_CHECKING:
    from collections.abc import Callable


class SharedCalls:
    """Does for a worker's calls what the worker asks, and gives back what they hold when the worker is gone.

    Arguments:
        quotas: The quotas of all workers.
        admission: The admission of all workers.
        worker: The connection to the worker, which gets the answers.

    Attributes:
        handlers: What to call for each line of the worker that is about a call.
    """

    def __init__(self, quotas: Quotas, admission: Admission, worker: Connection) -> None:
        self._quotas = quotas
        self._admission = admission
        self._worker = worker
        self._places: dict[int, Place] = {}
        self._shares: dict[int, Callable[[int], None]] = {}
        """For each call that has a share of the quotas, what gives back the share, except for so many tokens."""
        self._entries: dict[int, asyncio.Handle] = {}
        """For each call that has arrived and has not entered yet, what has it enter."""
        self.handlers: Final[dict[str, Callable[..., None]]] = {
            "enter": self.enter,
            "admit": self.admit,
            "leave": self.leave,
            "settle": self.settle,
        }

    def enter(self, number: int, *entry: Any) -> None:  # noqa: ANN401 - the arguments of `_enter`, as they come over the wire
        """Takes a share of the quotas and a place in the queue for a new call, which waits for room if its prompt is ready.

        It does so when all lines have been read that have arrived by now. A caller whose call on another worker has ended may
        have begun this one, and the event loop may read the line of this one first.
        """
        self._entries[number] = asyncio.get_running_loop().call_soon(self._enter, number, *entry)

    def _enter(  # noqa: PLR0917 - as they come over the wire
        self,
        number: int,
        caller_line: Line,
        samples: int,
        tokens: int,
        time_remaining: float | None,
        context_tokens: int | None = None,
    ) -> None:
        del self._entries[number]
        caller = wire.to_caller(caller_line)
        try:
            taken = self._quotas.reserve(caller, samples, tokens)
            self._shares[number] = lambda used: self._quotas.settle(caller, samples, taken - used)
            place = self._admission.queue(samples, caller, time_remaining)
            place.join()
        except wire.REFUSALS as error:
            self._refuse(number, error)
            return
        self._places[number] = place
        place.call_if_evicted(partial(self._lose, number))
        if context_tokens is not None:
            self._admit(number, context_tokens, time_remaining)

    def admit(self, number: int, context_tokens: int, time_remaining: float | None) -> None:
        """Has a call wait for room, unless it was refused meanwhile."""
        # After `_enter`.
        asyncio.get_running_loop().call_soon(self._admit, number, context_tokens, time_remaining)

    def _admit(self, number: int, context_tokens: int, time_remaining: float | None) -> None:
        if place := self._places.get(number):
            try:
                place.request(context_tokens, time_remaining, partial(self._worker.send, "admitted", number))
            except wire.REFUSALS as error:
                self._refuse(number, error)

    def leave(self, number: int, finished: bool, used_tokens: int | None) -> None:
        """Gives up the place or the room of a call, and its share of the quotas if it is known what the call has used."""
        if entry := self._entries.pop(number, None):
            entry.cancel()
        if place := self._places.pop(number, None):
            place.release(finished=finished)
        if used_tokens is not None:
            self.settle(number, used_tokens)

    def settle(self, number: int, used_tokens: int) -> None:
        """Gives back a call's share of the quotas."""
        if give_back := self._shares.pop(number, None):
            give_back(used_tokens)

    def give_back_all(self) -> None:
        """Gives back what all calls hold. What they have used is not known, and does not count, as after a restart."""
        for number in [*self._entries, *self._places]:
            self.leave(number, False, None)
        for number in list(self._shares):
            self.settle(number, 0)

    def _lose(self, number: int, error: Exception) -> None:
        # Later: the admission is in the midst of giving the place to another call.
        asyncio.get_running_loop().call_soon(self._refuse, number, error)

    def _refuse(self, number: int, error: Exception) -> None:
        # The share stays until the worker says what the call has used: its prompt may have been read.
        self.leave(number, False, None)
        self._worker.send("refused", number, wire.from_error(error))
