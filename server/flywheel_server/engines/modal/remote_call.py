"""One call of a method on Modal: spawns, polls and cancels it.

What happens if a request to Modal fails with a status, after the retries of Modal's own client:

    status                              FunctionMap         FunctionGetOutputs       FunctionCallCancel
                                        spawns the call     polls the call           cancels the call
    CANCELLED, UNKNOWN,                 UNAVAILABLE         retry                    retry
    DEADLINE_EXCEEDED, INTERNAL,
    UNAVAILABLE, errors of the
    transport
    RESOURCE_EXHAUSTED                  RESOURCE_EXHAUSTED  retry                    retry
    FAILED_PRECONDITION, ABORTED        3 tries, then       retry                    retry
                                        UNAVAILABLE
    NOT_FOUND                           3 tries, then       confirm, then            confirm, then done:
                                        FAILED_PRECONDITION UNAVAILABLE              there is nothing to cancel
    PERMISSION_DENIED, UNAUTHENTICATED, 3 tries, then       confirm, then            retry
    INVALID_ARGUMENT, OUT_OF_RANGE,     FAILED_PRECONDITION FAILED_PRECONDITION
    UNIMPLEMENTED
    ALREADY_EXISTS, DATA_LOSS           INTERNAL            confirm, then INTERNAL   retry

- "retry": tries again with backoff, until requests have failed for `FLYWHEEL_MODAL_TIMEOUT` seconds; by then, Modal has ended
  the call. Polls also end if the caller goes.
- "confirm": tries again until the error has lasted for `CONFIRMATION_SECONDS`; see `engines.modal.retries`.
- "3 tries": a call is spawned again only if Modal has certainly not accepted it. Each further try looks the class up again,
  because it may have been deployed again.
"""

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, Final

import modal
from modal import exception

from flywheel_server.engines.base import EngineError, EngineOverloadedError, EngineUnavailableError
from flywheel_server.engines.modal.errors import ErrorTranslator, source_of
from flywheel_server.engines.modal.retries import RetryPolicy
from flywheel_server.engines.modal.waits import modal_result, retrieve_error

POLL_TIMEOUT: Final = 15.0
"""Maximum seconds that one poll waits for the call to end. Longer polls make fewer requests.

Modal answers a poll as soon as the call ends.
"""

SILENCE_BEFORE_POLL_SECONDS: Final = 2.0
"""Seconds without an event from a call after which the call is polled."""


class CallRequestError(Exception):
    """A request about a call has failed. That does not mean that the call has failed.

    Attributes:
        error: The error to raise if requests go on failing.
        gone: Whether Modal says that there is no such call.
    """

    def __init__(self, error: EngineError, *, gone: bool) -> None:
        super().__init__(error)
        self.error = error
        self.gone = gone

    @property
    def is_transient(self) -> bool:
        """Whether the same request is likely to succeed later."""
        return not self.gone and isinstance(self.error, EngineUnavailableError | EngineOverloadedError)


class RemoteCall:
    """One call of a method on Modal.

    Arguments:
        spawn: Spawns the call; raises `EngineError`.
        errors: Translates errors of Modal and of the class.
        timeout: Seconds after which Modal ends the call.

    Attributes:
        ended: Whether the call needs no cancel: it has ended, is cancelled, or has nothing left to do.
    """

    def __init__(self, spawn: Coroutine[Any, Any, modal.FunctionCall[Any]], errors: ErrorTranslator, timeout: float) -> None:
        self._errors = errors
        self._timeout = timeout
        # In a task of its own, which is never cancelled: otherwise, a call might run on Modal whose id nobody knows.
        self._spawning = asyncio.create_task(spawn)
        self._spawning.add_done_callback(retrieve_error)
        self.ended = False
        self._poll_at = 0.0
        self._poll_policy = RetryPolicy(timeout)

    def note_events(self) -> None:
        """Notes that events have arrived from the call. So it is alive, and polls are put off."""
        self._poll_at = asyncio.get_running_loop().time() + SILENCE_BEFORE_POLL_SECONDS
        self._poll_policy.reset()

    async def accepted(self) -> modal.FunctionCall[Any]:
        """Waits until Modal has accepted the call, and returns its handle; raises `EngineError`."""
        return await asyncio.shield(self._spawning)

    async def result(self) -> Any:  # noqa: ANN401 - the caller validates it
        """Waits for the end of the call, and returns its result; raises the call's `EngineError`."""
        call = await self.accepted()
        policy = RetryPolicy(self._timeout)
        while True:
            try:
                return await self._poll(call, None)
            except CallRequestError as failure:
                await asyncio.sleep(policy.delay(failure.error, is_transient=failure.is_transient))

    async def polled_result(self, poll_slots: asyncio.Semaphore) -> Any:  # noqa: ANN401 - as above
        """Does what `result` does, with short polls, each of which needs one of the slots that all calls share.

        A poll is a request that waits. Modal may limit how many requests a client has open, and events are requested too. So a
        call is polled only if no events arrive from it, and after a failed poll it keeps its slot during the backoff.
        """
        call = await self.accepted()
        while True:
            while (left := self._poll_at - asyncio.get_running_loop().time()) > 0:  # noqa: ASYNC110 - waits for a time
                await asyncio.sleep(left)
            async with poll_slots:
                try:
                    return await self._poll(call, POLL_TIMEOUT)
                except TimeoutError:
                    self._poll_policy.reset()
                except CallRequestError as failure:
                    await asyncio.sleep(self._poll_policy.delay(failure.error, is_transient=failure.is_transient))

    async def has_ended(self) -> bool:
        """Returns whether the call has ended, as far as one poll tells."""
        with suppress(EngineError, TimeoutError, CallRequestError):
            await self._poll(await self.accepted(), 0)
        return self.ended

    async def _poll(self, call: modal.FunctionCall[Any], seconds: float | None) -> Any:  # noqa: ANN401 - as above
        """Waits that many seconds for the end of the call, or without limit if that is None. Returns the call's result.

        Raises the `EngineError` with which the call ended, TimeoutError if the call has not ended, and `CallRequestError`.
        """
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
            raise self._request_error(error) from None
        self.ended = True
        return result

    async def cancel(self) -> None:
        """Cancels the call on Modal; raises `CallRequestError`, after which the caller may try again."""
        call = await self.accepted()
        try:
            await modal_result(call.cancel.aio())
        except Exception as error:  # noqa: BLE001 - translated
            raise self._request_error(error) from None
        self.ended = True

    def _request_error(self, error: BaseException) -> CallRequestError:
        if isinstance(error, exception.NotFoundError | exception.OutputExpiredError):
            return CallRequestError(EngineUnavailableError(f"the call is gone: {error}"), gone=True)
        try:
            with self._errors():
                raise error
        except EngineError as translated:
            return CallRequestError(translated, gone=False)
