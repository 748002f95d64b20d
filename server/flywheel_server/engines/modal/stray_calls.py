"""Cancels stray calls: calls that send events although no caller waits for them.

A call is stray if Modal has accepted it, but the answer was lost, so that the gateway does not know the call.
"""

import asyncio
from contextlib import suppress
from typing import Any, Final

import modal
import structlog

from flywheel_server.engines.modal.event_batch import EventBatch
from flywheel_server.engines.modal.waits import modal_result, start_in_background

log = structlog.stdlib.get_logger(__name__)

STRAY_CANCEL_DELAY: Final = 10.0
"""Seconds that a call may go on sending events after its caller has left, or after it was cancelled here.

After that time, the call is cancelled (again).
"""

MAX_CONCURRENT_STRAY_CANCELS: Final = 8
"""How many stray calls are cancelled at the same time. A further call is cancelled after it has sent another batch."""


class StrayCalls:
    """Cancels stray calls in the background."""

    def __init__(self) -> None:
        self._spared: set[str] = set()
        self._cancelling: set[asyncio.Task[None]] = set()

    def close(self) -> None:
        """Gives up the cancels that are under way."""
        for task in self._cancelling:
            task.cancel()

    def spare(self, call: str) -> None:
        """Does not cancel the call with this id, ours or Modal's, for `STRAY_CANCEL_DELAY`: usually, a cancel is under way."""
        self._spared.add(call)
        asyncio.get_running_loop().call_later(STRAY_CANCEL_DELAY, self._spared.discard, call)

    def cancel(self, batch: EventBatch) -> None:
        """Cancels the call of the batch, which no caller waits for; see `STRAY_CANCEL_DELAY` for what delays that."""
        if {batch.call, batch.function_call} & self._spared or len(self._cancelling) >= MAX_CONCURRENT_STRAY_CANCELS:
            return
        log.warning("stray call cancelled", call=batch.function_call)
        self.spare(batch.function_call)
        task = start_in_background(_cancel(batch.function_call))
        self._cancelling.add(task)
        task.add_done_callback(self._cancelling.discard)


async def _cancel(function_call: str) -> None:
    with suppress(Exception):  # the call is cancelled again when it sends again
        call: modal.FunctionCall[Any] = modal.FunctionCall.from_id(function_call)
        await modal_result(call.cancel.aio())
