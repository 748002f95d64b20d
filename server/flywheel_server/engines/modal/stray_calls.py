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

Usually, a cancel is still under way. After that time, the call is cancelled (again).
"""

MAX_CONCURRENT_STRAY_CANCELS: Final = 8
"""How many stray calls are cancelled at the same time. A further call is cancelled after it has sent another batch."""


class StrayCalls:
    """Cancels stray calls in the background."""

    def __init__(self) -> None:
        self._recent: dict[str, float] = {}
        """When each caller left, by our id of the call, and when each stray call was cancelled, by Modal's id; oldest first."""
        self._cancelling: set[asyncio.Task[None]] = set()

    def close(self) -> None:
        """Gives up the cancels that are under way."""
        for task in self._cancelling:
            task.cancel()

    def note_left(self, call: str) -> None:
        """Notes that the caller of the call with this id of ours has left."""
        self._forget_old()
        self._recent[call] = asyncio.get_running_loop().time()

    def cancel(self, batch: EventBatch) -> None:
        """Cancels the call of the batch, which no caller waits for; see `STRAY_CANCEL_DELAY` for what delays that."""
        self._forget_old()
        if {batch.call, batch.function_call} & self._recent.keys() or len(self._cancelling) >= MAX_CONCURRENT_STRAY_CANCELS:
            return
        log.warning("stray call cancelled", call=batch.function_call)
        self._recent[batch.function_call] = asyncio.get_running_loop().time()
        task = start_in_background(_cancel(batch.function_call))
        self._cancelling.add(task)
        task.add_done_callback(self._cancelling.discard)

    def _forget_old(self) -> None:
        now = asyncio.get_running_loop().time()
        while self._recent and now - next(iter(self._recent.values())) > STRAY_CANCEL_DELAY:
            del self._recent[next(iter(self._recent))]


async def _cancel(function_call: str) -> None:
    with suppress(Exception):  # the call is cancelled again when it sends again
        call: modal.FunctionCall[Any] = modal.FunctionCall.from_id(function_call)
        await modal_result(call.cancel.aio())
