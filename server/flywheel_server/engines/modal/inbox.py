"""Receives the events of all calls to a class on Modal, through one partition of a `modal.Queue`.

All calls share one partition, so that one request to Modal brings the events of many calls: the more calls, the fewer requests
for each. What happens if a request fails with a status:

    RPC                status                      what happens
    QueueGetOrCreate   any                         retried with backoff for 10 s; then the calls that wait for the queue end
                                                   with the last status
    QueueGet           NOT_FOUND, twice            new calls get a new queue; older calls go on waiting
                       NOT_FOUND, for 10 s         the queue is gone: calls that wait for it end with UNAVAILABLE
                       any other                   retried with backoff while there are calls, which end by their deadlines, or
                                                   because Modal says how they ended
                       OK, but events were lost    the call that misses them ends with UNAVAILABLE
    QueueHeartbeat     any                         Modal's client retries after 300 s. If the queue expires before that,
                                                   QueueGet fails with NOT_FOUND
    QueuePut,          any                         renewals of the lease: retried after 1 s; see `engines.modal.lease`
    QueueClear

Before that, Modal's client itself has retried UNAVAILABLE, INTERNAL, UNKNOWN, CANCELLED and DEADLINE_EXCEEDED a few times, and
any status for as long as Modal asks for it with a retry policy. `deployment.outbox` is the other side, in a container.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import modal
import structlog

from flywheel_server import running_time
from flywheel_server.engines.base import EngineError
from flywheel_server.engines.modal.errors import ErrorTranslator
from flywheel_server.engines.modal.queue_reader import MAX_RETRY_DELAY, Address, QueueReader
from flywheel_server.engines.modal.received_events import ReceivedEvents
from flywheel_server.engines.modal.retries import Backoff
from flywheel_server.engines.modal.waits import cancel_and_wait, modal_result, start_in_background

log = structlog.stdlib.get_logger(__name__)

QUEUE_CREATE_TIMEOUT: Final = 10.0
"""Seconds for which creating a queue is retried."""


class Inbox:
    """Receives the events of calls. Creates the queue when the first call needs it, and a new queue if that is gone.

    Arguments:
        environment: The environment on Modal in which the queue is created; if empty, that of the Modal profile.
        errors: Translates errors of Modal.
    """

    def __init__(self, environment: str, errors: ErrorTranslator) -> None:
        self._environment = environment
        self._errors = errors
        self._opening: asyncio.Task[QueueReader] | None = None
        self._readers: set[QueueReader] = set()

    async def close(self) -> None:
        """Stops reading, and releases the queue."""
        await cancel_and_wait(self._opening)
        await asyncio.gather(*(reader.close() for reader in self._readers))

    @asynccontextmanager
    async def receiving(self) -> AsyncIterator[tuple[Address, ReceivedEvents]]:
        """Yields a new address for a call, and the events that arrive there within the context; raises `EngineError`."""
        # In a task of its own: a caller who leaves must neither stop it for the other callers nor leave a queue unclosed.
        if self._opening is None or _must_reopen(self._opening):
            self._opening = start_in_background(self._open())
        reader = await asyncio.shield(self._opening)
        with reader.receiving() as (address, received):
            yield address, received

    async def _open(self) -> QueueReader:
        backoff = Backoff(MAX_RETRY_DELAY)
        deadline = running_time.now() + QUEUE_CREATE_TIMEOUT
        while True:
            context = modal.Queue.ephemeral(environment_name=self._environment or None)
            try:
                with self._errors():
                    queue = await modal_result(context.__aenter__())
            except EngineError as error:
                if running_time.now() > deadline:
                    raise
                log.warning("queue not made", error=str(error))
                await asyncio.sleep(backoff.delay(error))
            else:
                break
        for reader in self._readers:
            reader.retire()
        reader = QueueReader(queue, context)
        self._readers.add(reader)
        reader.reading.add_done_callback(lambda _: self._readers.discard(reader))
        return reader


def _must_reopen(opening: asyncio.Task[QueueReader]) -> bool:
    if not opening.done():
        return False
    return opening.cancelled() or opening.exception() is not None or opening.result().is_failing
