"""One call of a method on Modal: spawned, watched, cancelled.

What becomes of a request to Modal, by the status that it fails with, once Modal's client has given up repeating it:

    status                              FunctionMap         FunctionGetOutputs       FunctionCallCancel
                                        spawns the call     looks if it has ended    cancels it
    CANCELLED, UNKNOWN,                 UNAVAILABLE         again                    again
    DEADLINE_EXCEEDED, INTERNAL,
    UNAVAILABLE, errors of the
    transport
    RESOURCE_EXHAUSTED                  RESOURCE_EXHAUSTED  again                    again
    FAILED_PRECONDITION, ABORTED        3 tries, then       again                    again
                                        UNAVAILABLE
    NOT_FOUND                           3 tries, then       doubted, then            doubted, then there is
                                        FAILED_PRECONDITION UNAVAILABLE              nothing to cancel
    PERMISSION_DENIED, UNAUTHENTICATED, 3 tries, then       doubted, then            again
    INVALID_ARGUMENT, OUT_OF_RANGE,     FAILED_PRECONDITION FAILED_PRECONDITION
    UNIMPLEMENTED
    ALREADY_EXISTS, DATA_LOSS           INTERNAL            doubted, then INTERNAL   again

- "Again" is with backoff, for as long as the caller waits for the call, and for `FLYWHEEL_MODAL_TIMEOUT` seconds of failures at
  most: by then Modal has ended the call.
- "Doubted" is again for `CONFIRMATION_SECONDS`: see `flywheel_server.engines.modal.retries`.
- Only what Modal has certainly not accepted is spawned again. Each further try looks the class up anew, which may have been
  deployed anew.
"""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager, suppress
from typing import Any, Final, TypeAlias

import modal
from modal import exception

from flywheel_server.engines.base import (
    EngineError,
    EngineOverloadedError,
    EngineUnavailableError,
)
from flywheel_server.engines.modal.errors import source_of
from flywheel_server.engines.modal.retries import RetryPolicy
from flywheel_server.engines.modal.waits import modal_result

Errors: TypeAlias = Callable[[], AbstractContextManager[None]]
"""Makes a context that turns whatever comes from Modal into errors of `engines.base`."""

POLL_TIMEOUT: Final = 15.0
"""How long one look at whether a call has ended lasts at most.

A look is a request that Modal answers as soon as the call ends: longer ones make fewer requests.
"""

SILENCE_BEFORE_POLL_SECONDS: Final = 2.0
"""How long nothing must have arrived from a call for it to be looked at."""


class CallRequestError(Exception):
    """A request about a call has failed, which tells nothing of the call unless it lasts.

    Attributes:
        error: The error to raise if it lasts.
        gone: Whether Modal says that there is no such call.
    """

    def __init__(self, error: EngineError, *, gone: bool) -> None:
        super().__init__(error)
        self.error = error
        self.gone = gone

    @property
    def passes(self) -> bool:
        """Whether such an error passes by itself."""
        return not self.gone and isinstance(self.error, EngineUnavailableError | EngineOverloadedError)


class RemoteCall:
    """One call of a method on Modal.

    Arguments:
        spawn: Spawns it; raises `EngineError`.
        errors: Turns whatever comes from Modal or the class into errors of `engines.base`.
        timeout: Seconds after which Modal ends the call.
    """

    def __init__(self, spawn: Coroutine[Any, Any, modal.FunctionCall[Any]], errors: Errors, timeout: float) -> None:
        self._errors = errors
        self._timeout = timeout
        # A task of its own: cancelled half way, it might leave a call behind that nobody knows.
        self._spawning = asyncio.create_task(spawn)
        self._spawning.add_done_callback(_look_at)
        self.ended = False
        """Whether there is nothing left to cancel."""
        self._silent_at = 0.0
        self._doubt = RetryPolicy(timeout)

    def heard(self) -> None:
        """Takes note that something has arrived from the call: it lives, and need not be looked at now."""
        self._silent_at = asyncio.get_running_loop().time() + SILENCE_BEFORE_POLL_SECONDS
        if self._doubt.failures:
            self._doubt.dispel()

    async def accepted(self) -> modal.FunctionCall[Any]:
        """Returns the call on Modal, once Modal has accepted it; raises `EngineError`."""
        return await asyncio.shield(self._spawning)

    async def result(self) -> Any:  # noqa: ANN401 - what has come is to be found out
        """Returns what the method returned; raises what became of it as `EngineError`."""
        call = await self.accepted()
        doubt = RetryPolicy(self._timeout)
        while True:
            try:
                return await self._outcome(call, None)
            except CallRequestError as unanswered:
                await asyncio.sleep(doubt.delay(unanswered.error, passes=unanswered.passes))

    async def watched(self, turns: asyncio.Semaphore) -> Any:  # noqa: ANN401 - as above
        """Does what `result` does, with a look at a time, in turns with other calls.

        Each look is a request that waits. Modal may limit how many of them a client has, and the events must have their turn.
        So a call is looked at only while nothing arrives from it, and one whose looks fail keeps its turn until the next.
        """
        call = await self.accepted()
        while True:
            while (left := self._silent_at - asyncio.get_running_loop().time()) > 0:  # noqa: ASYNC110 - for the time
                await asyncio.sleep(left)
            async with turns:
                try:
                    return await self._outcome(call, POLL_TIMEOUT)
                except TimeoutError:
                    self._doubt.dispel()
                except CallRequestError as unanswered:
                    await asyncio.sleep(self._doubt.delay(unanswered.error, passes=unanswered.passes))

    async def has_ended(self) -> bool:
        """Returns whether the call is known to have ended."""
        with suppress(EngineError, TimeoutError, CallRequestError):
            await self._outcome(await self.accepted(), 0)
        return self.ended

    async def _outcome(self, call: modal.FunctionCall[Any], seconds: float | None) -> Any:  # noqa: ANN401 - as above
        """Returns what the method returned; raises `EngineError`, TimeoutError if the call has not ended, or `CallRequestError`."""
        try:
            result = await modal_result(call.get.aio(timeout=seconds))
        except (asyncio.CancelledError, GeneratorExit):
            raise
        except BaseException as error:
            if source_of(error) != "request":
                self.ended = True
                with self._errors():
                    raise
            if isinstance(error, TimeoutError):
                raise TimeoutError from None
            raise self._unanswered(error) from None
        self.ended = True
        return result

    async def cancel(self) -> None:
        """Cancels the call on Modal; raises `CallRequestError`, after which it may be tried again."""
        call = await self.accepted()
        try:
            await modal_result(call.cancel.aio())
        except Exception as error:  # noqa: BLE001 - whatever it is
            raise self._unanswered(error) from None
        self.ended = True

    def _unanswered(self, error: BaseException) -> CallRequestError:
        if isinstance(error, exception.NotFoundError | exception.OutputExpiredError):
            return CallRequestError(EngineUnavailableError(f"the call is gone: {error}"), gone=True)
        try:
            with self._errors():
                raise error
        except EngineError as translated:
            return CallRequestError(translated, gone=False)


def _look_at(spawning: asyncio.Future[Any]) -> None:
    """Asyncio complains of an error that nobody looks at, as when the caller has gone."""
    if not spawning.cancelled():
        spawning.exception()
