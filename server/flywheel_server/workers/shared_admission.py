"""The admission control of a worker, which forwards to the admission of all workers in the parent."""

import asyncio
import itertools
from collections.abc import Callable
from typing import Self

from flywheel_server.access.callers import Caller
from flywheel_server.access.quotas import Usage, max_generated_tokens
from flywheel_server.engines.base import EngineModel
from flywheel_server.messages import GenerationRequest
from flywheel_server.workers import wire
from flywheel_server.workers.wire import Connection, Line


class SharedAdmissionControl:
    """An `AdmissionControl` that asks the parent."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.pending: dict[int, SharedPlace] = {}
        """Calls that the parent has neither admitted nor refused, by number."""
        self.prepares_at_once = False
        """Whether the engine prepares a prompt without delay, because it counts no tokens."""
        self._numbers = itertools.count()
        self._end: Callable[[], Exception] | None = None
        self._model: EngineModel | None = None

    def set_capacity(self, model: EngineModel) -> None:
        """See `AdmissionControl.set_capacity`."""
        self._model = model
        self.prepares_at_once = not model.tokenizers
        self.connection.send("capacity", model.slots, model.shared_context_tokens)

    def acquire(self, request: GenerationRequest, caller: Caller, time_remaining: float | None) -> "SharedPlace":
        """See `AdmissionControl.acquire`; `SharedPlace.admitted` raises its errors. Raises here only if the parent is gone."""
        if self._end:
            raise self._end()
        slots = request.num_samples if self._model is None else self._model.slots_of(request)
        entry = (caller, slots, max_generated_tokens(request), time_remaining)
        return SharedPlace(self, next(self._numbers), entry)

    def admit(self, number: int) -> None:
        """Admits a call, unless it has ended."""
        if place := self.pending.pop(number, None):
            place.let_in()

    def refuse(self, number: int, error: Line) -> None:
        """Refuses a call, unless it has ended."""
        if place := self.pending.pop(number, None):
            place.lose(wire.to_error(error))

    def end(self, error: Callable[[], Exception]) -> None:
        """Ends all waiting calls and all later calls with an error. Called when the parent is gone."""
        self._end = error
        while self.pending:
            self.pending.popitem()[1].lose(error())


class SharedPlace:
    """A call's reservation of quota and its place in the queue of all workers, for the length of the context.

    A call does not wait for the answer to its entry. If preparing the prompt takes time, the call prepares until the parent
    refuses it. If it takes none, the call asks for entry and slots with one message, when its prompt is ready.
    """

    def __init__(self, admission: SharedAdmissionControl, number: int, entry: Line) -> None:
        self._admission = admission
        self._send = admission.connection.send
        self._number = number
        self._entry = entry
        """The elements of the message `enter` from the caller to the remaining time; see `wire`."""
        self._has_entered = False
        self._usage = Usage()
        self._lost: Exception | None = None
        self._on_lost: Callable[[Exception], None] | None = None
        self._admission_result: asyncio.Future[None] | None = None

    async def __aenter__(self) -> tuple[Usage, Self]:
        if not self._admission.prepares_at_once:
            self._enter()
        return self._usage, self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self._has_entered:
            return
        self._admission.pending.pop(self._number, None)
        if self._usage.is_final:
            self._send("leave", self._number, kind is None, self._usage.tokens)
        else:
            self._send("leave", self._number, kind is None, None)
            self._usage.call_when_final(lambda: self._send("settle", self._number, self._usage.tokens))

    async def joined(self) -> None:
        """See `admission_control.Place.joined`."""
        if not self._has_entered:
            self._enter()
        self._send("confirm", self._number)
        await self._answer()

    async def admitted(self, context_tokens: int, time_remaining: float | None = None) -> None:
        """See `admission_control.Place.admitted`."""
        if self._has_entered:
            self._send("admit", self._number, context_tokens, time_remaining)
        else:
            self._enter(context_tokens)
        await self._answer()

    def call_if_evicted(self, callback: Callable[[Exception], None]) -> None:
        """See `admission_control.Place.call_if_evicted`."""
        self._on_lost = callback

    def let_in(self) -> None:
        """Ends the wait in `admitted`."""
        if self._admission_result is not None and not self._admission_result.done():
            self._admission_result.set_result(None)

    def lose(self, error: Exception) -> None:
        """Ends the call with an error, whatever it waits for."""
        self._lost = error
        if self._admission_result is not None and not self._admission_result.done():
            self._admission_result.set_exception(error)
        if self._on_lost is not None:
            self._on_lost(error)

    async def _answer(self) -> None:
        if self._lost is not None:
            raise self._lost
        self._admission_result = asyncio.get_running_loop().create_future()
        await self._admission_result

    def _enter(self, *context_tokens: int) -> None:
        self._has_entered = True
        self._admission.pending[self._number] = self
        self._send("enter", self._number, *self._entry, *context_tokens)
