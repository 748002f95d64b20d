"""One call of a method on Modal: spawned, awaited, cancelled; and the events that it sends, brought into order."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractContextManager
from typing import Any, Final, TypeAlias

import modal
from pydantic import ValidationError

from flywheel_server.engines.base import (
    EngineError,
    EngineFailedError,
    EngineSetupError,
    EngineUnavailableError,
    Event,
    Started,
)
from flywheel_server.engines.inbox import Arrivals
from flywheel_server.engines.remote_events import Pile, Receipt

Method: TypeAlias = modal.Function[..., Any, Any]
Errors: TypeAlias = Callable[[], AbstractContextManager[None]]
"""Makes a context that turns whatever comes from Modal into errors of `engines.base`."""

WATCH_SECONDS: Final = 2.0
"""How long one look at whether a call has ended lasts."""

EVENTS_GRACE: Final = 10.0
"""Seconds for the rest of the events to arrive once the call that sent them has returned."""


class RemoteCall:
    """One call of a method on Modal."""

    def __init__(self, method: Method, arguments: dict[str, Any], errors: Errors) -> None:
        self._errors = errors
        # A task of its own: cancelled half way, it might leave a call behind that nobody knows.
        self._spawning = asyncio.ensure_future(method.spawn.aio(**arguments))
        self.ended = False
        """Whether there is nothing left to cancel."""

    async def accepted(self) -> modal.FunctionCall[Any]:
        """Returns the call on Modal, once Modal has accepted it; raises `EngineError`."""
        with self._errors():
            return await asyncio.shield(self._spawning)

    async def result(self) -> Any:  # noqa: ANN401 - what has come is to be found out
        """Returns what the method returned; raises what became of it as `EngineError`."""
        call = await self.accepted()
        return await self._get(call, None)

    async def watched(self, watchers: asyncio.Semaphore) -> Any:  # noqa: ANN401 - what has come is to be found out
        """Does what `result` does, with a look at a time, in turns with other calls.

        Each look is a request that waits. Modal may limit how many of them a client has, and the events must have their turn.
        """
        call = await self.accepted()
        while True:
            async with watchers:
                try:
                    return await self._get(call, WATCH_SECONDS)
                except TimeoutError:
                    continue

    async def _get(self, call: modal.FunctionCall[Any], timeout: float | None) -> Any:  # noqa: ANN401, ASYNC109 - as Modal has it
        timed_out: TimeoutError | None = None
        begun = asyncio.get_running_loop().time()
        try:
            # Here, before a task is left by it: what a method raises may be a SystemExit, which would end the event loop.
            with self._errors():
                try:
                    result = await call.get.aio(timeout=timeout)
                except TimeoutError as error:
                    # One that comes at once is what the method raised: to wait for that again would never end.
                    if timeout is None or asyncio.get_running_loop().time() - begun < timeout / 2:
                        raise
                    timed_out = error
        except EngineSetupError as error:
            if error.__cause__ is None:
                raise  # by our own class
            # Modal had the class, and accepted the call: what is missing now is the call itself, or something of the class.
            raise EngineUnavailableError(f"the call is gone: {error.__cause__}") from None
        if timed_out is not None:
            raise timed_out
        self.ended = True
        return result

    async def cancel(self) -> None:
        """Cancels the call on Modal; raises `EngineError`, after which it may be tried again."""
        try:
            call = await self.accepted()
        except EngineError:
            return  # whoever spawned it was told, and there is no call
        with self._errors():
            await call.cancel.aio()
        self.ended = True


async def events_of(call: RemoteCall, arrivals: Arrivals, watchers: asyncio.Semaphore) -> AsyncGenerator[Event, None]:
    """Yields the events that arrive from the call; raises what becomes of it. Stop reading after the last sample."""
    watching = asyncio.create_task(call.watched(watchers))

    def end(_: object) -> None:
        if not watching.cancelled():
            arrivals.put_nowait(watching.exception() or watching.result())

    watching.add_done_callback(end)
    order = _Order()
    receipt: Receipt | None = None
    try:
        while receipt is None or not order.has_all(receipt):
            try:
                async with asyncio.timeout(None if receipt is None else EVENTS_GRACE):
                    arrival = await arrivals.get()
            except TimeoutError:
                raise EngineUnavailableError("Modal lost the last events of the call") from None
            match arrival:
                case Pile():
                    for event in order.take(arrival):
                        yield event
                case BaseException():
                    raise arrival
                case returned:
                    receipt = _receipt(returned)
        raise EngineFailedError("the class returned before all samples had finished")
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


def _receipt(returned: Any) -> Receipt:  # noqa: ANN401 - what has come is to be found out
    try:
        return Receipt.model_validate(returned)
    except ValidationError:
        raise EngineFailedError("the class returned what is no receipt") from None


class _Order:
    """Takes the piles of a call as long as none is missing and all are of one attempt.

    When Modal loses a container, it runs the calls in it again in another one. Nobody notices as long as nothing was sent;
    after that, the text would begin anew, and differ.
    """

    def __init__(self) -> None:
        self._received = 0
        self._attempt = ""
        self._abandoned: set[str] = set()
        self._started = False
        self._sent = False

    def has_all(self, receipt: Receipt) -> bool:
        """Whether all piles have come that the receipt is for."""
        return (self._attempt, self._received) == (receipt.attempt, receipt.piles)

    def take(self, pile: Pile) -> list[Event]:
        """Returns the events of the pile that are news; raises `EngineUnavailableError`."""
        if pile.attempt in self._abandoned:
            return []
        if pile.attempt != self._attempt:
            if self._sent:
                raise EngineUnavailableError("Modal lost the container, and began the call anew in another one")
            self._abandoned.add(self._attempt)
            self._attempt = pile.attempt
            self._received = 0
        if pile.number != self._received:
            raise EngineUnavailableError("Modal lost events of the call")
        self._received += 1
        news = [event for event in pile.events if not (self._started and isinstance(event, Started))]
        self._started = True
        self._sent = self._sent or any(not isinstance(event, Started) for event in news)
        return news
