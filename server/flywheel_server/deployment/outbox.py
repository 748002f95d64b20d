"""Sends the events of a container's calls to a gateway through a `modal.Queue`, with as few requests to Modal as possible.

Events wait here until the next put, which sends the events of all calls in batches. If Modal answers with an error:

    RPC         status                what happens
    QueuePut    NOT_FOUND, for 10 s   the queue is gone, and its gateway too: the calls end, here and in the engine
                any, for 60 s         the calls end, here and in the engine
                any, until then       the put is repeated with backoff, in order. If Modal stored a batch but its answer was
                                      lost, the batch arrives twice, and the gateway drops one by its number
                no answer for 20 s    treated as a status
    QueueLen    any                   ignored: a failed check of the lease says nothing; see `engines.modal.lease`

`engines.modal.inbox` has the gateway's side, and says what Modal's client repeats by itself.
"""

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, Final, TypeVar

import modal
import structlog

from flywheel_server import running_time
from flywheel_server.engines.base import EngineUnavailableError, Event, Started, TextDelta
from flywheel_server.engines.modal.event_batch import EventBatch
from flywheel_server.engines.modal.lease import CHECK_INTERVAL, Lease
from flywheel_server.engines.modal.rate_limit import RateLimit
from flywheel_server.engines.modal.retries import CONFIRMATION_SECONDS, Backoff
from flywheel_server.engines.modal.waits import cancel_and_wait, modal_result
from flywheel_server.messages import GenerationResponseSample

AnyEvent = TypeVar("AnyEvent", bound=Event)

log = structlog.stdlib.get_logger(__name__)

PARTITION_TTL: Final = 3600
"""Seconds after which Modal deletes events that nobody has read, because their gateway is gone."""

PUT_INTERVAL: Final = 0.25
"""Seconds between two puts, unless an event is urgent: the first text of a call, or a finished sample."""

MAX_PUTS_PER_SECOND: Final = 6.0
"""Maximum average rate of puts, including the urgent ones."""

MAX_PUT_BURST: Final = 6
"""Maximum number of urgent puts without a pause between them."""

STARTED_EVENT_DELAY: Final = 0.25
"""Seconds that the event `Started` waits, so that one put can send it together with the first text."""

HEARTBEAT_INTERVAL: Final = 3.0
"""Seconds without a put after which a heartbeat is put."""

PUT_ATTEMPT_TIMEOUT: Final = 20.0
"""Seconds that one attempt at a put may take before it is repeated."""

MAX_RETRY_DELAY: Final = 2.0
"""Maximum seconds between two attempts at a put."""

PUT_TIMEOUT: Final = 60.0
"""Seconds for which a put is attempted before its calls end."""

LEAVE_TIMEOUT: Final = 8.0
"""Seconds to tell the gateways that the container ends. Modal grants a container 30 s for all that it does at its end."""

RECENT_SECONDS: Final = 30.0
"""Seconds after a call's end in which the gateway must still be told that the container ends."""

GATEWAY_GONE: Final = "the gateway of the call has gone"

MAX_BATCH_CHARACTERS: Final = 100_000
"""Maximum text of one batch, roughly. Modal takes items of up to 1 MiB, and the text of a sample is sent twice."""

MAX_PUT_CHARACTERS: Final = 4_000_000
"""Maximum text of one put, roughly."""

CHARACTERS_PER_LOGPROB: Final = 30
"""About how many bytes a token with its probability has in a batch. They count as text."""


class Sender:
    """The sink of one attempt at a call: collects its events for the next put, and merges the deltas of each sample."""

    is_full = False

    def __init__(self, outbox: "Outbox", call: str) -> None:
        self._outbox = outbox
        self._call = call
        self.attempt = uuid.uuid4().hex
        self._function_call = modal.current_function_call_id() or ""
        self.limit = asyncio.timeout(None)
        """The outbox reschedules this timeout to end the call."""
        self._batches = 0
        self._started: Started | None = None
        self._deltas: dict[int, list[TextDelta]] = {}
        self._sent_tokens: dict[int, int] = {}
        """By index: how many tokens of a sample its deltas had."""
        self._samples: list[GenerationResponseSample] = []
        self._has_failed = False
        self._has_sent_text = False
        self._stored = asyncio.Event()
        self._stored.set()

    def emit(self, event: Event) -> None:
        """Collects an event for the next put."""
        self._stored.clear()
        match event:
            case Started():
                self._started = event
                self._outbox.wake_later()
                return
            case TextDelta():
                self._deltas.setdefault(event.index, []).append(event)
                if event.tokens:
                    self._sent_tokens[event.index] = self._sent_tokens.get(event.index, 0) + len(event.tokens)
            case GenerationResponseSample():
                sent = self._sent_tokens.get(event.index)
                self._samples.append(event.model_copy(update={"tokens": event.tokens[sent:]}) if sent else event)
        self._outbox.wake(is_urgent=isinstance(event, GenerationResponseSample) or not self._has_sent_text)
        self._has_sent_text = True

    def fail(self) -> None:
        """Tells the gateway, with the next put, that the attempt has failed."""
        self._has_failed = True
        self._stored.clear()
        self._outbox.wake(is_urgent=True)

    async def stored(self) -> int:
        """Waits until all events are in the queue, and returns the number of batches."""
        await self._stored.wait()
        return self._batches

    def note_stored(self) -> None:
        """Notes that all batches that were taken are in the queue."""
        if not self.has_events:
            self._stored.set()

    @property
    def has_events(self) -> bool:
        """Whether an event, or the end of the attempt, waits for the next put."""
        return bool(self._started or self._deltas or self._samples or self._has_failed)

    def take(self) -> list[EventBatch]:
        """Returns the events since the last call of this method."""
        if not self.has_events:
            return []
        events: list[Event] = [self._started] if self._started else []
        events += [_merged(part) for deltas in self._deltas.values() for part in _split(deltas)]
        events += self._samples
        container, function_call = self._outbox.container, self._function_call
        batch = partial(EventBatch, self._call, self.attempt, container=container, function_call=function_call)
        batches = [batch(number, part) for number, part in enumerate(_split(events), self._batches)]
        self._batches += len(batches)
        if self._has_failed:
            batches.append(batch(self._batches, [], ended=True))
        self._started, self._deltas, self._samples, self._has_failed = None, {}, [], False
        return batches


class Outbox:
    """Puts the events of one gateway's calls into its partition of the queue, and ends the calls if the gateway is gone.

    Each batch has the id of this container, `container`.
    """

    def __init__(self, queue: modal.Queue, partition: str, container: str) -> None:
        self._queue = queue
        self._partition = partition
        self.container = container
        self._senders: set[Sender] = set()
        self._lease = Lease(queue, partition)
        self._has_events = asyncio.Event()
        self._has_urgent_events = asyncio.Event()
        self._limit = RateLimit(MAX_PUTS_PER_SECOND, MAX_PUT_BURST)
        self._put_at = float("-inf")
        self._last_call_ended_at = float("-inf")
        self._end_reason = ""
        self._putting: asyncio.Task[None] | None = None
        self._checking: asyncio.Task[None] | None = None

    @property
    def is_idle(self) -> bool:
        """Whether there are no calls."""
        return not self._senders

    @asynccontextmanager
    async def sending(self, call: str) -> AsyncIterator[Sender]:
        """Gives the sender of a call's events. If the context raises an exception, earlier events are put first.

        Raises `EngineUnavailableError`, also from within the context, if the gateway is gone.
        """
        if self._lease.has_expired:
            await self._lease.check()
            if self._lease.has_expired:
                raise EngineUnavailableError(GATEWAY_GONE)
        sender = Sender(self, call)
        try:
            async with sender.limit:
                self._enter(sender)
                try:
                    yield sender
                except Exception:
                    sender.fail()
                    await sender.stored()
                    raise
                finally:
                    self._senders.discard(sender)
                    self._last_call_ended_at = asyncio.get_running_loop().time()
                    if not self._senders:
                        self._has_events.set()
        except TimeoutError:
            if not sender.limit.expired():
                raise
            raise EngineUnavailableError(self._end_reason) from None

    def _enter(self, sender: Sender) -> None:
        self._senders.add(sender)
        if self._putting is None or self._putting.done():
            self._putting = asyncio.create_task(self._put_all())
        if self._checking is None or self._checking.done():
            self._checking = asyncio.create_task(self._check_lease())

    def wake(self, *, is_urgent: bool) -> None:
        """Notes that a call has events."""
        self._has_events.set()
        if is_urgent:
            self._has_urgent_events.set()

    def wake_later(self) -> None:
        """Notes that a call has an event that can wait for the next one."""
        asyncio.get_running_loop().call_later(STARTED_EVENT_DELAY, self._has_events.set)

    async def leave(self) -> None:
        """Ends the calls, because the container ends, and tells the gateway.

        Modal's client may have cancelled the calls before. So the gateway is told also if the last call has ended recently.
        """
        self._end("the container ends")
        await cancel_and_wait(self._putting, self._checking)
        if not self._senders and asyncio.get_running_loop().time() - self._last_call_ended_at > RECENT_SECONDS:
            return
        with suppress(TimeoutError, EngineUnavailableError):
            async with asyncio.timeout(LEAVE_TIMEOUT):
                await self._put([EventBatch.heartbeat(self.container, leaving=True)])

    def _end(self, why: str) -> None:
        running = [sender for sender in self._senders if not sender.limit.expired()]
        if running:
            log.warning("calls ended", reason=why, calls=len(running))
        self._end_reason = why
        for sender in running:
            sender.limit.reschedule(asyncio.get_running_loop().time())

    async def _check_lease(self) -> None:
        self._lease.restart()
        while self._senders and not self._lease.has_expired:
            await self._lease.check()
            await asyncio.sleep(CHECK_INTERVAL)
        self._end(GATEWAY_GONE)

    async def _put_all(self) -> None:
        try:
            while await self._wait_for_events():
                is_silent = asyncio.get_running_loop().time() - self._put_at >= HEARTBEAT_INTERVAL
                if is_silent or any(sender.has_events for sender in self._senders):
                    await self._wait_for_rate_limit()
                    await self._put(self._take() or [EventBatch.heartbeat(self.container)])
                    for sender in self._senders:
                        sender.note_stored()
        except EngineUnavailableError as error:
            self._end(str(error))

    async def _wait_for_events(self) -> bool:
        """Returns True when there are events or a heartbeat is due; False if no calls are left."""
        with suppress(TimeoutError):
            async with asyncio.timeout(HEARTBEAT_INTERVAL):
                await self._has_events.wait()
        self._has_events.clear()
        return bool(self._senders)

    async def _wait_for_rate_limit(self) -> None:
        """Waits for `PUT_INTERVAL` after the last put, or only for an urgent event, and then for the rate limit."""
        with suppress(TimeoutError):
            async with asyncio.timeout_at(self._put_at + PUT_INTERVAL):
                await self._has_urgent_events.wait()
        await self._limit.acquire()
        self._has_urgent_events.clear()
        self._put_at = asyncio.get_running_loop().time()

    def _take(self) -> list[EventBatch]:
        batches: list[EventBatch] = []
        size = 0
        for sender in self._senders:
            if size > MAX_PUT_CHARACTERS:
                self._has_events.set()
                break
            taken = sender.take()
            size += sum(_characters(event) for batch in taken for event in batch.events)
            batches += taken
        return batches

    async def _put(self, batches: list[EventBatch]) -> None:
        """Puts the batches into the queue. Raises `EngineUnavailableError` if that fails for too long."""
        backoff = Backoff(MAX_RETRY_DELAY)
        begun = running_time.now()
        missing_since: float | None = None
        items: list[Any] = [batch.pack() for batch in batches]
        while True:
            try:
                async with asyncio.timeout(PUT_ATTEMPT_TIMEOUT):
                    await modal_result(
                        self._queue.put_many.aio(items, block=False, partition=self._partition, partition_ttl=PARTITION_TTL)
                    )
            except Exception as error:  # noqa: BLE001 - from Modal or its transport, or the queue is full
                is_missing = isinstance(error, modal.exception.NotFoundError)
                missing_since = (missing_since or running_time.now()) if is_missing else None
                if missing_since is not None and running_time.now() - missing_since > CONFIRMATION_SECONDS:
                    raise EngineUnavailableError("events not sent: Modal no longer has the queue") from None
                if running_time.now() - begun > PUT_TIMEOUT:
                    raise EngineUnavailableError(f"events not sent: {type(error).__name__}") from None
                delay = backoff.delay(error)
            else:
                self._lease.note_put(len(items))
                return
            await asyncio.sleep(delay)


def _characters(event: Event) -> int:
    if isinstance(event, Started):
        return 0
    return len(event.text) + sum((len(token.likeliest) + 1) * CHARACTERS_PER_LOGPROB for token in event.tokens)


def _merged(deltas: Sequence[TextDelta]) -> TextDelta:
    """Returns one delta for successive deltas of a sample."""
    last = deltas[-1]
    text = "".join([delta.text for delta in deltas])
    return TextDelta(last.index, text, last.generated_tokens, tuple(token for delta in deltas for token in delta.tokens))


def _split(events: Sequence[AnyEvent]) -> list[list[AnyEvent]]:
    """Splits the events into parts of at most about `MAX_BATCH_CHARACTERS`; a longer event is a part of its own."""
    parts: list[list[AnyEvent]] = []
    size = MAX_BATCH_CHARACTERS
    for event in events:
        size += _characters(event)
        if size > MAX_BATCH_CHARACTERS or not parts:
            parts.append([])
            size = _characters(event)
        parts[-1].append(event)
    return parts
