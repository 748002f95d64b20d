"""Reads the partition of a `modal.Queue` through which the events of all calls come, and delivers them to the calls."""

import asyncio
import queue
import uuid
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, contextmanager, suppress
from typing import Any, Final

import modal
import structlog

from flywheel_server import running_time
from flywheel_server.engines.base import EngineError, EngineUnavailableError
from flywheel_server.engines.modal.event_batch import EventBatch
from flywheel_server.engines.modal.lease import LeaseRenewal, leased_partition
from flywheel_server.engines.modal.rate_limit import RateLimit
from flywheel_server.engines.modal.received_events import ReceivedEvents
from flywheel_server.engines.modal.retries import CONFIRMATION_SECONDS, Backoff
from flywheel_server.engines.modal.stray_calls import StrayCalls
from flywheel_server.engines.modal.waits import cancel_and_wait, modal_result, start_in_background

log = structlog.stdlib.get_logger(__name__)

MAX_BATCHES_PER_READ: Final = 500
"""Maximum number of batches that one request returns."""

MAX_READS_PER_SECOND: Final = 6.0
"""Maximum rate of requests for events in the long run, however many containers send events."""

MAX_READ_BURST: Final = 6
"""Maximum number of requests without a pause between them, after a time with fewer requests."""

READ_TIMEOUT: Final = 2.0
"""Seconds that one request waits for events if there are calls."""

MAX_RETRY_DELAY: Final = 2.0
"""Maximum seconds between two tries. Events wait during that time."""

CONTAINER_TTL: Final = 600.0
"""Seconds for which a container is remembered after its last batch or heartbeat."""

QUEUE_GONE: Final = "Modal no longer has the queue"

Address = dict[str, Any]
"""The keyword arguments that tell the class where to send the events of a call."""


class QueueReader:
    """Reads a partition of a queue until it is closed, until the queue is gone, or until it is retired and has no calls left.

    The reading never pauses: a request that is cancelled may still take events out of the queue, which are then lost.

    Arguments:
        queue: The queue.
        context: The context that has created the queue. The reader ends it, which releases the queue.

    Attributes:
        reading: The task that reads.
    """

    def __init__(self, queue: modal.Queue, context: AbstractAsyncContextManager[modal.Queue]) -> None:
        self._queue = queue
        self._context = context
        self._partition = leased_partition()
        self._calls: dict[str, ReceivedEvents] = {}
        self._is_retired = False
        self._not_found = 0
        """How many times Modal has said, since the last successful read, that it has no such queue."""
        self._not_found_since = 0.0
        self._clock = 0.0
        """Seconds in which the queue could be read."""
        self._last_heard: dict[str, float] = {}
        """When the last batch or heartbeat of each container arrived, on that clock."""
        self._stray_calls = StrayCalls()
        self._lease = LeaseRenewal(queue, self._partition)
        self._renewing: asyncio.Task[None] | None = None
        self.reading = start_in_background(self._run())

    @property
    def is_failing(self) -> bool:
        """Whether new calls should use another queue."""
        return self._not_found > 1 or self.reading.done()

    def retire(self) -> None:
        """Ends the reading once there are no calls."""
        self._is_retired = True
        self._end_if_unused()

    async def close(self) -> None:
        """Stops reading, and releases the queue."""
        await cancel_and_wait(self.reading)

    @contextmanager
    def receiving(self) -> Iterator[tuple[Address, ReceivedEvents]]:
        """Yields a new address for a call, and the events that arrive there within the context."""
        call = uuid.uuid4().hex
        received = self._calls[call] = ReceivedEvents()
        if self.reading.done():
            received.fail(EngineUnavailableError(QUEUE_GONE))
        elif self._renewing is None or self._renewing.done():
            self._renewing = start_in_background(self._lease.renew_while(lambda: bool(self._calls)))
        try:
            yield {"queue": self._queue, "partition": self._partition, "call": call}, received
        finally:
            del self._calls[call]
            self._stray_calls.spare(call)  # it is being cancelled
            self._end_if_unused()

    def _end_if_unused(self) -> None:
        if self._is_retired and not self._calls:
            self.reading.cancel()

    async def _run(self) -> None:
        try:
            await self._read()
        finally:
            for received in self._calls.values():
                received.fail(EngineUnavailableError(QUEUE_GONE))
            self._stray_calls.close()
            if self._renewing is not None:
                self._renewing.cancel()
            with suppress(Exception):
                await modal_result(self._context.__aexit__(None, None, None))

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        backoff, limit = Backoff(MAX_RETRY_DELAY), RateLimit(MAX_READS_PER_SECOND, MAX_READ_BURST)
        read_at = loop.time()
        while not self._is_queue_gone():
            await limit.acquire()
            try:
                items = await self._get_items()
            except Exception as error:  # noqa: BLE001 - whatever the error, the next try may succeed
                self._note_if_not_found(error)
                if not backoff.failures:
                    log.warning("events not read", error=f"{type(error).__name__}: {error}")
                await asyncio.sleep(backoff.delay(error))
                read_at = loop.time()
                continue
            if backoff.failures:
                log.info("events are read again", refused=backoff.failures)
            self._not_found = 0
            backoff.reset()
            # Modal may take longer to answer, but a request waits for events only for READ_TIMEOUT.
            self._clock += min(loop.time() - read_at, READ_TIMEOUT)
            read_at = loop.time()
            for item in items:
                self._deliver(item)
            for received in self._calls.values():
                received.check(self._clock, self._last_heard)
        log.warning("events no longer read", error=QUEUE_GONE)

    async def _get_items(self) -> list[Any]:
        # Without calls, a request waits as long as Modal's client allows, so that there are few requests.
        timeout = READ_TIMEOUT if self._calls else None
        try:
            return await modal_result(
                self._queue.get_many.aio(MAX_BATCHES_PER_READ, timeout=timeout, partition=self._partition)
            )
        except queue.Empty:
            return []

    def _note_if_not_found(self, error: Exception) -> None:
        if isinstance(error, modal.exception.NotFoundError):
            self._not_found += 1
            if self._not_found == 1:
                self._not_found_since = running_time.now()

    def _is_queue_gone(self) -> bool:
        return self._not_found > 1 and running_time.now() - self._not_found_since > CONFIRMATION_SECONDS

    def _deliver(self, item: Any) -> None:  # noqa: ANN401 - validated here
        received = self._calls.get(str(item.get("call"))) if isinstance(item, dict) else None
        try:
            batch = EventBatch.unpack(item)
        except EngineError as error:
            if received is not None:
                received.fail(error)
            return
        if batch.container:
            self._note_heard(batch.container)
        if batch.leaving:
            for each in self._calls.values():
                each.note_leaving(batch.container)
        elif received is not None:
            received.add(batch)
        elif batch.function_call and not batch.ended:
            self._stray_calls.cancel(batch)

    def _note_heard(self, container: str) -> None:
        if container not in self._last_heard:
            self._last_heard = {known: at for known, at in self._last_heard.items() if self._clock - at < CONTAINER_TTL}
        self._last_heard[container] = self._clock
