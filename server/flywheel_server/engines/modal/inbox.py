"""The events of all calls to a class on Modal, which come through one partition of a `modal.Queue`, handed to each call.

One partition for all, rather than one for each call, because then one request to Modal brings the events of many calls: the
more there is to do, the fewer requests it takes for each. No status that Modal answers with is a verdict by itself:

    RPC                status                      what happens
    QueueGetOrCreate   any                         tried again with backoff for 10 s; then the calls that wait for the queue
                                                   end with the status of the last answer
    QueueGet           NOT_FOUND, twice running    new calls get a new queue; those before go on waiting
                       NOT_FOUND, for 10 s         the queue is gone: calls that wait for it end with UNAVAILABLE
                       any other                   tried again with backoff for as long as there are calls: they end by their
                                                   deadlines, or because Modal says how they ended
                       OK, but events were lost    the call that misses them ends with UNAVAILABLE
    QueueHeartbeat     any                         Modal's client tries again after 300 s. A queue that expires meanwhile is
                                                   NOT_FOUND for QueueGet, see there
    QueuePut,          any                         of the lease: tried again a second later; see `engines.modal.lease`
    QueueClear

A call that goes on sending events though nobody waits for it is cancelled: Modal may accept a call, and its answer be lost.

Modal's client itself repeats UNAVAILABLE, INTERNAL, UNKNOWN, CANCELLED and DEADLINE_EXCEEDED a few times, and any status for as
long as Modal asks it to with a retry policy, before that counts as an answer here. `deployment.outbox` has the other side.
"""

import asyncio
import contextvars
import queue
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, contextmanager, suppress
from typing import Any, Final

import modal
import structlog

from flywheel_server import running_time
from flywheel_server.engines.base import EngineError, EngineUnavailableError
from flywheel_server.engines.modal.event_batch import EventBatch
from flywheel_server.engines.modal.lease import RENEWAL_INTERVAL, lease_of, leased_partition
from flywheel_server.engines.modal.rate_limit import RateLimit
from flywheel_server.engines.modal.received_events import ReceivedEvents
from flywheel_server.engines.modal.retries import Backoff
from flywheel_server.engines.modal.waits import modal_result

log = structlog.stdlib.get_logger(__name__)

MAX_BATCHES_PER_READ: Final = 500
"""How many piles one request brings at most."""

MAX_READS_PER_SECOND: Final = 6.0
"""How many requests for events a gateway makes in the long run, however many containers send some."""

MAX_READ_BURST: Final = 6
"""How many it makes without a pause between them, after a time with fewer."""

READ_TIMEOUT: Final = 2.0
"""How long one request waits for events while there are calls. It is the clock by which containers are silent."""

MAX_RETRY_DELAY: Final = 2.0
"""Seconds between two tries at most: events wait meanwhile."""

QUEUE_CREATE_TIMEOUT: Final = 10.0
"""How long the making of a queue is tried again for."""

QUEUE_MISSING_SECONDS: Final = 10.0
"""How long Modal must say that it has no such queue until that is believed."""

MAX_LEASE_ITEMS: Final = 100
"""How many items the lease holds before it is cleared: Modal does not tell the length of a partition that holds very many."""

RENEWAL_RETRY_DELAY: Final = 1.0
"""Seconds until a renewal that failed is tried again."""

STRAY_CANCEL_DELAY: Final = 10.0
"""How long a call may go on sending events after its caller has gone, until it is cancelled; and until it is so once more."""

MAX_CONCURRENT_STRAY_CANCELS: Final = 8
"""How many of them are cancelled at a time: the next is when it sends again."""

CONTAINER_TTL: Final = 600.0
"""How long a container is remembered after its last sign of life."""

Errors = Callable[[], AbstractContextManager[None]]
Address = dict[str, Any]
"""What the class needs to send events of a call, as its keyword arguments."""


class Inbox:
    """Receives the events of calls, through a queue that is made when the first call needs it, and anew if it is gone.

    `environment` is where on Modal the queue is made; empty is that of the Modal profile. `errors` makes a context that turns
    whatever comes from Modal into errors of `engines.base`.
    """

    def __init__(self, environment: str, errors: Errors) -> None:
        self._environment = environment
        self._errors = errors
        self._opening: asyncio.Task[_Reader] | None = None
        self._readers: set[_Reader] = set()

    async def close(self) -> None:
        """Stops reading, and lets go of the queue."""
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.gather(self._opening, return_exceptions=True)
        await asyncio.gather(*(reader.close() for reader in self._readers))

    @asynccontextmanager
    async def receiving(self) -> AsyncIterator[tuple[Address, ReceivedEvents]]:
        """Gives a new address for a call, and what arrives there for the length of the context; raises `EngineError`."""
        # A task of its own: a caller who goes away must not take it from others, nor leave a queue that nobody closes.
        if self._opening is None or _failed(self._opening):
            self._opening = asyncio.create_task(self._open(), context=contextvars.Context())
        reader = await asyncio.shield(self._opening)
        with reader.receiving() as (address, arrivals):
            yield address, arrivals

    async def _open(self) -> "_Reader":
        backoff = Backoff(MAX_RETRY_DELAY)
        given_up = running_time.now() + QUEUE_CREATE_TIMEOUT
        while True:
            making = modal.Queue.ephemeral(environment_name=self._environment or None)
            try:
                with self._errors():
                    made = await modal_result(making.__aenter__())
            except EngineError as error:
                if running_time.now() > given_up:
                    raise
                log.warning("queue not made", error=str(error))
                await asyncio.sleep(backoff.delay(error))
            else:
                return self._read_from(made, making)

    def _read_from(self, made: modal.Queue, making: AbstractAsyncContextManager[modal.Queue]) -> "_Reader":
        for reader in self._readers:
            reader.retire()
        reader = _Reader(made, making)
        self._readers.add(reader)
        reader.reading.add_done_callback(lambda _: self._readers.discard(reader))
        return reader


def _failed(opening: "asyncio.Task[_Reader]") -> bool:
    if not opening.done():
        return False
    return opening.cancelled() or opening.exception() is not None or opening.result().is_doubtful


class _Reader:
    """Reads a partition of a queue until it is closed, the queue is gone, or it was retired and has no calls left.

    The reading never pauses: a request that is cancelled may still take events out of the queue, and lose them.
    """

    def __init__(self, made: modal.Queue, making: AbstractAsyncContextManager[modal.Queue]) -> None:
        self._queue = made
        self._making = making
        self._partition = leased_partition()
        self._calls: dict[str, ReceivedEvents] = {}
        self._retired = False
        self._missing = 0
        """How many times running Modal has said that it has no such queue."""
        self._missing_since = 0.0
        self._clock = 0.0
        """Seconds for which the queue could be read."""
        self._heard: dict[str, float] = {}
        """When each container gave its last sign of life, by that clock."""
        self._left: dict[str, float] = {}
        """When callers left, by the ids of their calls, and when strays were cancelled, by Modal's ids; in order of time."""
        self._cancelling: set[asyncio.Task[None]] = set()
        self._renewing: asyncio.Task[None] | None = None
        self._renewed_at = float("-inf")
        self._renewals = 0
        # In no call's context: what they log is of none.
        self.reading = self._in_background(self._run())

    @staticmethod
    def _in_background(work: Any) -> asyncio.Task[None]:  # noqa: ANN401 - a coroutine
        return asyncio.create_task(work, context=contextvars.Context())

    @property
    def is_doubtful(self) -> bool:
        """Whether new calls had better not rely on the queue."""
        return self._missing > 1 or self.reading.done()

    def retire(self) -> None:
        """Ends the reading as soon as there are no calls."""
        self._retired = True
        self._end_if_retired()

    async def close(self) -> None:
        """Stops reading, and lets go of the queue."""
        self.reading.cancel()
        await asyncio.gather(self.reading, return_exceptions=True)

    @contextmanager
    def receiving(self) -> Iterator[tuple[Address, ReceivedEvents]]:
        """Gives a new address for a call, and what arrives there for the length of the context."""
        call = uuid.uuid4().hex
        arrivals = self._calls[call] = ReceivedEvents()
        if self.reading.done():
            arrivals.fail(_gone())
        elif self._renewing is None or self._renewing.done():
            self._renewing = self._in_background(self._renew())
        try:
            yield {"queue": self._queue, "partition": self._partition, "call": call}, arrivals
        finally:
            del self._calls[call]
            self._forget_old()
            self._left[call] = asyncio.get_running_loop().time()
            self._end_if_retired()

    def _end_if_retired(self) -> None:
        if self._retired and not self._calls:
            self.reading.cancel()

    async def _run(self) -> None:
        try:
            await self._read()
        finally:
            for arrivals in self._calls.values():
                arrivals.fail(_gone())
            for task in (*self._cancelling, *filter(None, [self._renewing])):
                task.cancel()
            with suppress(Exception):
                await modal_result(self._making.__aexit__(None, None, None))

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        backoff, limit = Backoff(MAX_RETRY_DELAY), RateLimit(MAX_READS_PER_SECOND, MAX_READ_BURST)
        read_at, refused = loop.time(), 0
        while not self._is_gone():
            await limit.acquire()
            try:
                data = await self._arrived()
            except Exception as error:  # noqa: BLE001 - whatever it is, the next try may succeed
                self._note_whether_missing(error)
                if not refused:
                    log.warning("events not read", error=f"{type(error).__name__}: {error}")
                refused += 1
                await asyncio.sleep(backoff.delay(error))
                read_at = loop.time()
                continue
            if refused:
                log.info("events are read again", refused=refused)
                refused = 0
            self._missing = 0
            backoff.reset()
            # However long Modal took for it, a request waited for no more than this.
            self._clock += min(loop.time() - read_at, READ_TIMEOUT)
            read_at = loop.time()
            for each in data:
                self._hand_over(each)
            for arrivals in self._calls.values():
                arrivals.check(self._clock, self._heard)
        log.warning("events no longer read", error="Modal no longer has the queue")

    async def _arrived(self) -> list[Any]:
        try:
            # Without calls, a request is as long as Modal's client lets it be, to make few of them.
            seconds = READ_TIMEOUT if self._calls else None
            return await modal_result(
                self._queue.get_many.aio(MAX_BATCHES_PER_READ, timeout=seconds, partition=self._partition)
            )
        except queue.Empty:
            return []

    def _note_whether_missing(self, error: Exception) -> None:
        if isinstance(error, modal.exception.NotFoundError):
            self._missing += 1
            if self._missing == 1:
                self._missing_since = running_time.now()

    def _is_gone(self) -> bool:
        return self._missing > 1 and running_time.now() - self._missing_since > QUEUE_MISSING_SECONDS

    def _hand_over(self, data: Any) -> None:  # noqa: ANN401 - what has come is to be found out
        arrivals = self._calls.get(str(data.get("call"))) if isinstance(data, dict) else None
        try:
            pile = EventBatch.unpack(data)
        except EngineError as error:
            if arrivals is not None:
                arrivals.fail(error)
            return
        if pile.container:
            self._note_life_of(pile.container)
        if pile.leaving:
            for each in self._calls.values():
                each.leave(pile.container)
        elif arrivals is not None:
            arrivals.add(pile)
        elif pile.function_call and not pile.ended:
            self._stop_if_stray(pile)

    def _stop_if_stray(self, pile: EventBatch) -> None:
        """Cancels the call of the pile, which nobody waits for, unless its caller has left just now, who cancels it."""
        self._forget_old()
        if {pile.call, pile.function_call} & self._left.keys() or len(self._cancelling) >= MAX_CONCURRENT_STRAY_CANCELS:
            return
        log.warning("stray call cancelled", call=pile.function_call)
        self._left[pile.function_call] = asyncio.get_running_loop().time()
        task = self._in_background(_cancel(pile.function_call))
        self._cancelling.add(task)
        task.add_done_callback(self._cancelling.discard)

    def _forget_old(self) -> None:
        now = asyncio.get_running_loop().time()
        while self._left and now - next(iter(self._left.values())) > STRAY_CANCEL_DELAY:
            del self._left[next(iter(self._left))]

    def _note_life_of(self, container: str) -> None:
        if container not in self._heard:
            self._heard = {known: at for known, at in self._heard.items() if self._clock - at < CONTAINER_TTL}
        self._heard[container] = self._clock

    async def _renew(self) -> None:
        """Renews the lease for as long as there are calls."""
        loop = asyncio.get_running_loop()
        lease = lease_of(self._partition)
        await asyncio.sleep(self._renewed_at + RENEWAL_INTERVAL - loop.time())
        while self._calls:
            try:
                if self._renewals % MAX_LEASE_ITEMS == MAX_LEASE_ITEMS - 1:
                    await modal_result(self._queue.clear.aio(partition=lease))
                await modal_result(self._queue.put.aio(None, block=False, partition=lease))
            except Exception as error:  # noqa: BLE001 - whatever it is, the next try may succeed
                log.debug("lease not renewed", error=f"{type(error).__name__}: {error}")
                await asyncio.sleep(RENEWAL_RETRY_DELAY)
            else:
                self._renewals += 1
                self._renewed_at = loop.time()
                await asyncio.sleep(RENEWAL_INTERVAL)


async def _cancel(function_call: str) -> None:
    with suppress(Exception):  # it is cancelled again when it sends again
        call: modal.FunctionCall[Any] = modal.FunctionCall.from_id(function_call)
        await modal_result(call.cancel.aio())


def _gone() -> EngineUnavailableError:
    return EngineUnavailableError("Modal no longer has the queue")
