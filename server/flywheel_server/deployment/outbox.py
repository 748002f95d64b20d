"""What the generations in a container send to a gateway through a `modal.Queue`, with as few requests to Modal as possible.

Events wait here until the next put, which takes those of all calls. No status that Modal answers a put with is a verdict:

    RPC         status                what happens
    QueuePut    NOT_FOUND, for 10 s   the queue is gone, and its gateway with it: the calls end here, and in the engine
                any, for 60 s         the calls end likewise
                any, until then       tried again with backoff, in order. What was stored although its answer was lost comes
                                      twice: the gateway drops it by its number
                no answer for 20 s    as any other
    QueueLen    any                   of the lease: a look that failed says nothing; see `deployment.lease`

`engines.modal.inbox` has the gateway's side, and what Modal's client repeats by itself.
"""

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, Final

import modal
import structlog

from flywheel_server import running_time
from flywheel_server.deployment.lease import LOOK_INTERVAL, Lease
from flywheel_server.engines.base import EngineUnavailableError, Event, Started, TextDelta
from flywheel_server.engines.modal.event_batch import EventBatch
from flywheel_server.engines.modal.rate_limit import RateLimit
from flywheel_server.engines.modal.retries import Backoff
from flywheel_server.engines.modal.waits import modal_result
from flywheel_server.messages import GenerationResponseSample

log = structlog.stdlib.get_logger(__name__)

PARTITION_TTL: Final = 3600
"""Seconds after which Modal clears what nobody has read, because the gateway that asked for it has gone."""

PUT_INTERVAL: Final = 0.25
"""Seconds from one put to the next, unless what is to be put is urgent: the first text of a call, or a finished sample."""

PUTS_PER_SECOND: Final = 6.0
"""How many puts there are in the long run, the urgent ones included."""

PUTS_AT_ONCE: Final = 6
"""How many urgent puts there may be without a pause between them."""

STARTED_DELAY: Final = 0.25
"""Seconds for which it waits for text, in one put with it, to be said that the engine has begun on a call."""

SIGN_INTERVAL: Final = 3.0
"""Seconds without a put after which one says that the container lives."""

ANSWER_SECONDS: Final = 20.0
"""How long one put is waited for before it is tried again."""

MAX_RETRY_DELAY: Final = 2.0
"""Seconds between two tries of a put at most."""

PUT_SECONDS: Final = 60.0
"""How long a put is tried for before its calls end."""

GONE_SECONDS: Final = 10.0
"""How long Modal must say that it has no such queue until that is believed."""

LEAVE_SECONDS: Final = 8.0
"""How long the gateways are told that the container ends. Modal grants a container 30 s for all that it does then."""

RECENTLY: Final = 30.0
"""Seconds for which a call that has ended may still matter to the gateway."""

GATEWAY_GONE: Final = "the gateway of the call has gone"

PILE_CHARACTERS: Final = 100_000
"""About how much text goes into one pile: Modal takes items of up to 1 MiB, and the text of a sample comes twice."""

PUT_CHARACTERS: Final = 4_000_000
"""About how much text goes into one put."""


class Sender:
    """What one attempt at a call sends. Text that waits for the next put is joined, so that it takes no more than itself."""

    is_full = False

    def __init__(self, outbox: "Outbox", call: str) -> None:
        self._outbox = outbox
        self._call = call
        self.attempt = uuid.uuid4().hex
        self._function_call = modal.current_function_call_id() or ""
        self.limit = asyncio.timeout(None)
        """Ends the call when it is rescheduled."""
        self._piles = 0
        self._started: Started | None = None
        self._texts: dict[int, list[str]] = {}
        self._tokens: dict[int, int] = {}
        self._samples: list[GenerationResponseSample] = []
        self._has_failed = False
        self._text_came = False
        self._stored = asyncio.Event()
        self._stored.set()

    def emit(self, event: Event) -> None:
        """Takes in an event for the next put."""
        match event:
            case Started():
                self._started = event
            case TextDelta():
                self._texts.setdefault(event.index, []).append(event.text)
                self._tokens[event.index] = event.generated_tokens
            case GenerationResponseSample():
                self._samples.append(event)
        self._stored.clear()
        if isinstance(event, Started):
            self._outbox.wake_later()
        else:
            self._outbox.wake(is_urgent=isinstance(event, GenerationResponseSample) or not self._text_came)
            self._text_came = True

    def fail(self) -> None:
        """Has the gateway told that the attempt has failed."""
        self._has_failed = True
        self._stored.clear()
        self._outbox.wake(is_urgent=True)

    async def stored(self) -> int:
        """Returns how many piles were sent, once all of them are in the queue."""
        await self._stored.wait()
        return self._piles

    def note_stored(self) -> None:
        """Notes that all piles that were taken are in the queue."""
        if not self.has_something:
            self._stored.set()

    @property
    def has_something(self) -> bool:
        """Whether something waits for the next put."""
        return bool(self._started or self._texts or self._samples or self._has_failed)

    def take(self) -> list[EventBatch]:
        """Returns what has come since the last time."""
        if not self.has_something:
            return []
        events: list[Event] = [self._started] if self._started else []
        events += [TextDelta(index, "".join(texts), self._tokens[index]) for index, texts in self._texts.items()]
        events += self._samples
        container, function_call = self._outbox.container, self._function_call
        pile = partial(EventBatch, self._call, self.attempt, container=container, function_call=function_call)
        piles = [pile(number, part) for number, part in enumerate(_parts(events), self._piles)]
        self._piles += len(piles)
        if self._has_failed:
            piles.append(pile(self._piles, [], ended=True))
        self._started, self._texts, self._samples, self._has_failed = None, {}, [], False
        return piles


class Outbox:
    """Puts what the calls of one gateway send into its partition of the queue, and ends them when nobody is there to read it.

    `container` is the id of this container in its piles.
    """

    def __init__(self, queue: modal.Queue, partition: str, container: str) -> None:
        self._queue = queue
        self._partition = partition
        self.container = container
        self._senders: set[Sender] = set()
        self._lease = Lease(queue, partition)
        self._news = asyncio.Event()
        self._urgent_news = asyncio.Event()
        self._limit = RateLimit(PUTS_PER_SECOND, PUTS_AT_ONCE)
        self._put_at = float("-inf")
        self._left_at = float("-inf")
        """When a call ended last."""
        self._why_ended = ""
        self._putting: asyncio.Task[None] | None = None
        self._looking: asyncio.Task[None] | None = None

    @property
    def is_idle(self) -> bool:
        """Whether there are no calls."""
        return not self._senders

    @asynccontextmanager
    async def sending(self, call: str) -> AsyncIterator[Sender]:
        """Gives what sends the events of a call. If the context raises an exception, what was sent before is put first.

        Raises `EngineUnavailableError`, in the middle of the context, if nobody reads the events.
        """
        if self._lease.has_expired:
            await self._lease.look()
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
                    self._left_at = asyncio.get_running_loop().time()
                    if not self._senders:
                        self._news.set()
        except TimeoutError:
            if not sender.limit.expired():
                raise
            raise EngineUnavailableError(self._why_ended) from None

    def _enter(self, sender: Sender) -> None:
        self._senders.add(sender)
        if self._putting is None or self._putting.done():
            self._putting = asyncio.create_task(self._put_all())
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())

    def wake(self, *, is_urgent: bool) -> None:
        """Notes that a call has something to send."""
        self._news.set()
        if is_urgent:
            self._urgent_news.set()

    def wake_later(self) -> None:
        """Notes that a call has something to send that can wait for what comes next."""
        asyncio.get_running_loop().call_later(STARTED_DELAY, self._news.set)

    async def leave(self) -> None:
        """Ends the calls, and tells the gateway that they end, because the container does.

        Modal's client cancels the calls before that: the gateway is told of those that have ended just now, too.
        """
        self._end("the container ends")
        tasks = [task for task in (self._putting, self._looking) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if not self._senders and asyncio.get_running_loop().time() - self._left_at > RECENTLY:
            return
        with suppress(TimeoutError, EngineUnavailableError):
            async with asyncio.timeout(LEAVE_SECONDS):
                await self._put([EventBatch.heartbeat(self.container, leaving=True)])

    def _end(self, why: str) -> None:
        running = [sender for sender in self._senders if not sender.limit.expired()]
        if running:
            log.warning("calls ended", reason=why, calls=len(running))
        self._why_ended = why
        for sender in running:
            sender.limit.reschedule(asyncio.get_running_loop().time())

    async def _look(self) -> None:
        self._lease.restart()
        while self._senders and not self._lease.has_expired:
            await self._lease.look()
            await asyncio.sleep(LOOK_INTERVAL)
        self._end(GATEWAY_GONE)

    async def _put_all(self) -> None:
        try:
            while await self._has_calls():
                if self._must_put():
                    await self._turn()
                    await self._put(self._take() or [EventBatch.heartbeat(self.container)])
                    for sender in self._senders:
                        sender.note_stored()
        except EngineUnavailableError as error:
            self._end(str(error))

    async def _has_calls(self) -> bool:
        """Returns True when there is something to put, or a sign of life is due; False if there are no calls any more."""
        with suppress(TimeoutError):
            async with asyncio.timeout(SIGN_INTERVAL):
                await self._news.wait()
        self._news.clear()
        return bool(self._senders)

    def _must_put(self) -> bool:
        is_silent = asyncio.get_running_loop().time() - self._put_at >= SIGN_INTERVAL
        return is_silent or any(sender.has_something for sender in self._senders)

    async def _turn(self) -> None:
        """Returns when the next put may be made."""
        loop = asyncio.get_running_loop()
        with suppress(TimeoutError):
            async with asyncio.timeout_at(self._put_at + PUT_INTERVAL):
                await self._urgent_news.wait()
        await self._limit.acquire()
        self._urgent_news.clear()
        self._put_at = loop.time()

    def _take(self) -> list[EventBatch]:
        piles: list[EventBatch] = []
        size = 0
        for sender in self._senders:
            if size > PUT_CHARACTERS:
                self._news.set()
                break
            taken = sender.take()
            size += sum(_size(event) for pile in taken for event in pile.events)
            piles += taken
        return piles

    async def _put(self, piles: list[EventBatch]) -> None:
        """Returns when the piles are in the queue; raises `EngineUnavailableError` if they cannot get there."""
        backoff = Backoff(MAX_RETRY_DELAY)
        begun = running_time.now()
        missing_since: float | None = None
        items: list[Any] = [pile.pack() for pile in piles]
        while True:
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    await modal_result(
                        self._queue.put_many.aio(items, block=False, partition=self._partition, partition_ttl=PARTITION_TTL)
                    )
            except Exception as error:  # noqa: BLE001 - of Modal, of its transport, or because the queue is full
                is_missing = isinstance(error, modal.exception.NotFoundError)
                missing_since = (missing_since or running_time.now()) if is_missing else None
                if missing_since is not None and running_time.now() - missing_since > GONE_SECONDS:
                    raise EngineUnavailableError("events not sent: Modal no longer has the queue") from None
                if running_time.now() - begun > PUT_SECONDS:
                    raise EngineUnavailableError(f"events not sent: {type(error).__name__}") from None
                delay = backoff.delay(error)
            else:
                self._lease.note_put(len(items))
                return
            await asyncio.sleep(delay)


def _size(event: Event) -> int:
    return 0 if isinstance(event, Started) else len(event.text)


def _parts(events: list[Event]) -> list[list[Event]]:
    """Returns the events in parts, each of about `PILE_CHARACTERS` at most, or of one event."""
    parts: list[list[Event]] = []
    size = PILE_CHARACTERS
    for event in events:
        size += _size(event)
        if size > PILE_CHARACTERS or not parts:
            parts.append([])
            size = _size(event)
        parts[-1].append(event)
    return parts
