"""From the events of a generation to the messages of a stream, at the pace of who reads them and of the event loop.

What comes while a stream cannot write waits in a buffer, and leaves it merged: a message costs far more than the text in it, so
this is what carries the load when there is much. A stream cannot write while its last message is being written, and while
others write (`flywheel_server.write_scheduler`). A reader that keeps up, on a server that is not busy, gets every delta on its
own and without delay. A reader that does not keep up is waited for, with a bound on what piles up meanwhile.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol, Self

from flywheel_proto.v1 import generation_pb2 as pb

from flywheel_server import running_time
from flywheel_server.engines.base import EngineFailedError, Event, Sink, Started, TextDelta
from flywheel_server.errors import SlowReaderError
from flywheel_server.messages import GenerationResponseSample
from flywheel_server.translation import delta_to_proto, last_delta_to_proto, sample_to_proto
from flywheel_server.write_scheduler import WriteScheduler

Progress = TextDelta | GenerationResponseSample

MAX_SEPARATE_TEXTS: Final = 256
"""How many texts may wait one by one before they are joined."""

Write = Callable[[Any], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class ReaderPolicy:
    """What a reader is granted.

    Attributes:
        max_bytes: Text that may wait for it, in bytes of UTF-8, give or take one event.
        when_full: Whether the engine then waits for the reader, if it can, or the stream ends.
        timeout: Seconds of running time in which it must have taken a message, give or take a quarter.
    """

    max_bytes: int
    when_full: Literal["wait", "end"]
    timeout: float


class Buffer(Protocol):
    """What waits for the reader of a stream."""

    size: int
    """The text in it, in bytes of UTF-8."""

    def add(self, event: Progress) -> bool:
        """Takes in an event, and returns whether there is something to write."""

    def take(self) -> Sequence[Any]:
        """Returns the messages for all events that have come since it was last asked, and is empty again."""


class Source(Protocol):
    """A generation, of which `flywheel_server.generations.Generation` is one."""

    async def run(self, sink: Sink) -> None:
        """Puts the events into the sink; returns after the last one."""

    def end(self, error: Exception) -> None:
        """Raises the error in the task that delivers."""


class Delivery:
    """Delivers what generations make to those who read it."""

    def __init__(self, policy: ReaderPolicy) -> None:
        self._policy = policy
        self._scheduler = WriteScheduler()
        self._readers = _Readers(policy.timeout)

    async def deliver(self, source: Source, buffer: Buffer, begin: Callable[[], Awaitable[None]], write: Write) -> None:
        """Writes what the buffer makes of the events until they end; raises what they raise, after what came before it.

        `begin` is awaited once the engine has begun. If the reader is slower than the policy allows, the source is ended with
        `SlowReaderError`.
        """
        stream = _Stream(source, buffer, self._policy, self._scheduler)
        generating = asyncio.create_task(source.run(stream))
        generating.add_done_callback(stream.wake)
        try:
            with self._readers.watched(source) as reader:
                while not generating.done() or stream.has_news:
                    await stream.may_write()
                    if stream.is_beginning():
                        await begin()
                    for message in stream.take():
                        reader.begins_to_read()
                        await write(message)
                    reader.has_read()
            if generating.cancelled():
                raise EngineFailedError("the engine cancelled itself")
            generating.result()
        finally:
            generating.cancel()
            # Not `gather`, which would raise the error of a generation that has failed by itself.
            await asyncio.wait((generating,))

    async def deliver_one(self, source: Source, message: Any, write: Write) -> None:  # noqa: ANN401 - any message
        """Writes a message. If the reader takes longer than the policy allows, the source is ended with `SlowReaderError`."""
        with self._readers.watched(source) as reader:
            reader.begins_to_read()
            await write(message)


class _Stream:
    """The sink for the events of one generation, and the side that its writer sees."""

    def __init__(self, source: Source, buffer: Buffer, policy: ReaderPolicy, scheduler: WriteScheduler) -> None:
        self.is_full = False
        """Whether the engine is to wait for the reader."""
        self.has_news = False
        """Whether the engine has begun or there is something to write."""
        self._source = source
        self._buffer = buffer
        self._policy = policy
        self._scheduler = scheduler
        # Asking for the loop is a call of the system.
        self._loop = asyncio.get_running_loop()
        self._idle: asyncio.Future[None] | None = None
        """The permission that the writer waits for, while it has nothing to write."""
        self._begins = False
        self._is_first = True
        self._over = False

    def emit(self, event: Event) -> None:
        """Takes in an event."""
        buffer = self._buffer
        before = buffer.size
        if isinstance(event, Started):
            self._begins = True
        elif not buffer.add(event):
            return
        self.has_news = True
        if self._idle is not None:
            self._request(self._idle)
        if buffer.size > self._policy.max_bytes:
            if self._policy.when_full == "wait":
                self.is_full = True
            elif before:
                self._source.end(SlowReaderError())

    def wake(self, generating: asyncio.Task[None]) -> None:
        """Wakes the writer: there are no further events."""
        # Asyncio complains of an error that nobody looks at, and a stream that ends early does not.
        generating.cancelled() or generating.exception()
        self._over = True
        if self._idle is not None:
            self._request(self._idle)

    def may_write(self) -> asyncio.Future[None]:
        """Returns a future that is done once the stream may write and has something to write, or has ended."""
        permission = self._idle = self._loop.create_future()
        if self.has_news or self._over:
            self._request(permission)
        return permission

    def _request(self, permission: asyncio.Future[None]) -> None:
        self._idle = None
        self._scheduler.request(permission, is_first=self._is_first)

    def is_beginning(self) -> bool:
        """Returns whether the engine has begun since this was last asked."""
        begins, self._begins = self._begins, False
        return begins

    def take(self) -> Sequence[Any]:
        """Returns the messages to write."""
        self.has_news = self.is_full = False
        messages = self._buffer.take()
        if messages:
            self._is_first = False
        return messages


class _Reader:
    """Who reads a stream, and is watched for the length of the context."""

    def __init__(self, readers: "_Readers", source: Source) -> None:
        self.source = source
        self.reads_since: float | None = None
        """When the message that is being written began, in running time."""
        self._readers = readers
        self._clock = running_time.clock()

    def __enter__(self) -> Self:
        self._readers.watch(self, self._clock)
        return self

    def __exit__(self, *_: object) -> None:
        self._readers.forget(self)

    def begins_to_read(self) -> None:
        """Notes that a message is written from now on."""
        self.reads_since = self._clock.time()

    def has_read(self) -> None:
        """Notes that no message is being written."""
        self.reads_since = None


class _Readers:
    """Looks a few times in each timeout for messages that take too long, as a timer for each costs a tenth of a message."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._readers: set[_Reader] = set()
        self._looking = False

    def watched(self, source: Source) -> _Reader:
        """Returns a reader, which is watched for the length of its context. One that is slow ends its source."""
        return _Reader(self, source)

    def watch(self, reader: _Reader, clock: running_time.Clock) -> None:
        """Looks at the reader from now on."""
        self._readers.add(reader)
        if not self._looking:
            self._look_later(clock)

    def forget(self, reader: _Reader) -> None:
        """Looks at the reader no more."""
        self._readers.remove(reader)

    def _look_later(self, clock: running_time.Clock) -> None:
        self._looking = True
        clock.call_later(self._timeout / 4, lambda: self._look(clock))

    def _look(self, clock: running_time.Clock) -> None:
        latest = clock.time() - self._timeout
        for reader in self._readers:
            if reader.reads_since is not None and reader.reads_since <= latest:
                reader.source.end(SlowReaderError())
        self._looking = False
        if self._readers:
            self._look_later(clock)


class SampleBuffer:
    """Whole samples, each a message."""

    def __init__(self) -> None:
        self.size = 0
        self._samples: list[GenerationResponseSample] = []

    def add(self, event: Progress) -> bool:
        """Takes in an event; deltas are not kept."""
        if isinstance(event, TextDelta):
            return False
        self._samples.append(event)
        self.size += len(event.text.encode())
        return True

    def take(self) -> Sequence[pb.GenerationResponseSample]:
        """Returns the messages, the sample that finished first before the others."""
        samples, self._samples = self._samples, []
        self.size = 0
        return [sample_to_proto(sample) for sample in samples]


class SampleCollector:
    """The sink for a generation that is answered with a single message: keeps its samples.

    Arguments:
        begin: Called once the engine has begun.
    """

    is_full = False

    def __init__(self, begin: Callable[[], None]) -> None:
        self.samples: list[GenerationResponseSample] = []
        self._begin = begin

    def emit(self, event: Event) -> None:
        """Takes in an event; deltas are not kept."""
        if isinstance(event, GenerationResponseSample):
            self.samples.append(event)
        elif isinstance(event, Started):
            self._begin()


class _Pending:
    """What waits of one sample: the event that came last, and the texts of all of them."""

    __slots__ = ("last", "texts")

    def __init__(self, event: Progress, text: str) -> None:
        self.last = event
        self.texts = [text]

    def add(self, event: Progress, text: str) -> None:
        self.last = event
        self.texts.append(text)
        # Many small texts take many times the memory of one large.
        if len(self.texts) == MAX_SEPARATE_TEXTS:
            self.texts = ["".join(self.texts)]

    def message(self) -> pb.GenerationDelta:
        """Returns them as one."""
        text = "".join(self.texts)
        if isinstance(self.last, TextDelta):
            return delta_to_proto(self.last.index, text, self.last.generated_tokens)
        return last_delta_to_proto(self.last, text)


class DeltaBuffer:
    """The text of all samples, each character once: of what has piled up, one message for each sample."""

    def __init__(self) -> None:
        self.size = 0
        self._pending: dict[int, _Pending] = {}
        # How many characters of each sample have come, which its finished text repeats.
        self._seen: dict[int, int] = {}

    def add(self, event: Progress) -> bool:
        """Takes in an event."""
        index = event.index
        seen = self._seen.get(index, 0)
        text = event.text if isinstance(event, TextDelta) else event.text[seen:]
        self._seen[index] = seen + len(text)
        self.size += len(text) if text.isascii() else len(text.encode())
        if pending := self._pending.get(index):
            pending.add(event, text)
        else:
            self._pending[index] = _Pending(event, text)
        return True

    def take(self) -> Sequence[pb.GenerationDelta]:
        """Returns the messages, the sample whose event came first before the others."""
        pending, self._pending = self._pending, {}
        self.size = 0
        return [each.message() for each in pending.values()]
