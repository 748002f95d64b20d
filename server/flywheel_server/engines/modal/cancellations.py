"""Cancels calls on Modal whose callers have gone, in the background, so that a caller who goes is let go at once."""

import asyncio
import contextvars
from collections import Counter
from contextlib import suppress
from typing import Final

import structlog

from flywheel_server.engines.base import EngineError
from flywheel_server.engines.modal.remote_call import CallRequestError, RemoteCall
from flywheel_server.engines.modal.retries import RetryPolicy

log = structlog.stdlib.get_logger(__name__)

MAX_CONCURRENT_CANCELS: Final = 64
"""How many calls are being cancelled at a time: more take turns."""

FAILURES_BEFORE_POLL: Final = 3
"""Failed tries to cancel a call after which each further one is preceded by a look at whether the call has ended by itself."""

MAX_STOP_RETRY_DELAY: Final = 0.5
"""Seconds between two tries at most once the engine stops."""


class Cancellations:
    """Cancels calls, each until Modal has been told or the call has ended.

    Arguments:
        timeout: Seconds after which Modal ends a call by itself, so that nobody needs to cancel it any more.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._turns = asyncio.Semaphore(MAX_CONCURRENT_CANCELS)
        self._pending: set[asyncio.Task[None]] = set()
        self._delayed: set[RemoteCall] = set()
        self._outcomes: Counter[bool] = Counter()
        self._stopping = asyncio.Event()

    def add(self, call: RemoteCall) -> None:
        """Cancels the call, whose spawning may be under way, unless it has ended."""
        if call.ended:
            return
        # In no call's context: what it logs is of none.
        task = asyncio.create_task(self._cancel(call), context=contextvars.Context())
        self._pending.add(task)
        task.add_done_callback(self._pending.discard)

    async def stop(self, grace: float) -> None:
        """Goes on for so many seconds at most, and gives up what is left."""
        self._stopping.set()
        if not self._pending:
            return
        _, left = await asyncio.wait(self._pending, timeout=grace)
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left)
            log.warning("calls not cancelled", calls=len(left))

    async def _cancel(self, call: RemoteCall) -> None:
        try:
            await call.accepted()
        except EngineError:
            return  # which the caller was told; if there is a call all the same, `engines.modal.inbox` cancels it once it sends
        async with self._turns:
            is_over = await self._tell(call)
        if call in self._delayed:
            self._delayed.discard(call)
            self._outcomes[is_over] += 1
            if not self._delayed:
                log.info("delayed cancels over", made=self._outcomes[True], given_up=self._outcomes[False])
                self._outcomes.clear()

    async def _tell(self, call: RemoteCall) -> bool:
        """Returns True once Modal has been told or the call has ended, and False if neither is known after the timeout."""
        doubt = RetryPolicy(self._timeout)
        while True:
            try:
                await call.cancel()
            except CallRequestError as unanswered:
                if not self._delayed:
                    log.warning("cancels delayed", error=str(unanswered.error))
                self._delayed.add(call)
                try:
                    delay = doubt.delay(unanswered.error, passes=not unanswered.gone)
                except EngineError:
                    return unanswered.gone
            else:
                return True
            await self._pause(delay)
            if doubt.failures >= FAILURES_BEFORE_POLL and await call.has_ended():
                return True

    async def _pause(self, seconds: float) -> None:
        if self._stopping.is_set():
            await asyncio.sleep(min(seconds, MAX_STOP_RETRY_DELAY))
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
