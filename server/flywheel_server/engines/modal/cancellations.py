"""Cancels calls on Modal whose callers have gone. This happens in the background, so that no caller waits for it."""

import asyncio
from collections import Counter
from contextlib import suppress
from typing import Final

import structlog

from flywheel_server.engines.base import EngineError
from flywheel_server.engines.modal.remote_call import CallRequestError, RemoteCall
from flywheel_server.engines.modal.retries import RetryPolicy
from flywheel_server.engines.modal.waits import start_in_background

log = structlog.stdlib.get_logger(__name__)

MAX_CONCURRENT_CANCELS: Final = 64
"""How many calls are being cancelled at the same time; further calls wait."""

FAILURES_BEFORE_POLL: Final = 3
"""After that many failed tries to cancel a call, each further try is preceded by a poll: the call may have ended by itself."""

MAX_STOP_RETRY_DELAY: Final = 0.5
"""Maximum seconds between two tries while the engine stops."""


class Cancellations:
    """Cancels calls. Retries each until Modal has cancelled the call, or the call has ended by itself.

    Arguments:
        timeout: Seconds after which Modal ends a call by itself, so that retries end too.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._slots = asyncio.Semaphore(MAX_CONCURRENT_CANCELS)
        self._pending: set[asyncio.Task[None]] = set()
        self._delayed: set[RemoteCall] = set()
        """The calls whose first try to cancel has failed."""
        self._outcomes: Counter[bool] = Counter()
        """How many delayed calls are over, and how many were given up."""
        self._stopping = asyncio.Event()

    def add(self, call: RemoteCall) -> None:
        """Cancels the call in the background, unless it has ended. Modal may not have accepted the call yet."""
        if call.ended:
            return
        task = start_in_background(self._cancel(call))
        self._pending.add(task)
        task.add_done_callback(self._pending.discard)

    async def stop(self, grace_seconds: float) -> None:
        """Waits until all calls are cancelled, for that many seconds at most; then gives up."""
        self._stopping.set()
        if not self._pending:
            return
        _, left = await asyncio.wait(self._pending, timeout=grace_seconds)
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left)
            log.warning("calls not cancelled", calls=len(left))

    async def _cancel(self, call: RemoteCall) -> None:
        try:
            await call.accepted()
        except EngineError:
            # The caller got this error. If Modal runs the call nevertheless, `engines.modal.stray_calls` cancels it.
            return
        async with self._slots:
            is_over = await self._retry_until_over(call)
        if call in self._delayed:
            self._delayed.discard(call)
            self._outcomes[is_over] += 1
            if not self._delayed:
                log.info("delayed cancels over", made=self._outcomes[True], given_up=self._outcomes[False])
                self._outcomes.clear()

    async def _retry_until_over(self, call: RemoteCall) -> bool:
        """Returns True if the call is cancelled or has ended, and False if neither is known after the timeout."""
        policy = RetryPolicy(self._timeout)
        while True:
            try:
                await call.cancel()
            except CallRequestError as failure:
                if not self._delayed:
                    log.warning("cancels delayed", error=str(failure.error))
                self._delayed.add(call)
                try:
                    delay = policy.delay(failure.error, is_transient=not failure.gone)
                except EngineError:
                    return failure.gone
            else:
                return True
            await self._pause(delay)
            if policy.failures >= FAILURES_BEFORE_POLL and await call.has_ended():
                return True

    async def _pause(self, seconds: float) -> None:
        """Waits for that many seconds, or less if the engine stops."""
        if self._stopping.is_set():
            await asyncio.sleep(min(seconds, MAX_STOP_RETRY_DELAY))
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
