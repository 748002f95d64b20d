"""From the events of a generation to the messages of a stream, at the pace of who reads them.

What comes while a message is being written waits in a buffer, and leaves it merged: a message costs far more than the text in
it, so this is what carries the load when there is much. A reader that keeps up gets every delta on its own and without delay;
one that does not is waited for, with a bound on what piles up meanwhile.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol

from flywheel_proto.v1 import generation_pb2 as pb

from flywheel_server import running_time
from flywheel_server.engines.base import TextDelta
from flywheel_server.errors import SlowReaderError
from flywheel_server.messages import GenerationResponseSample
from flywheel_server.translation import delta_to_proto, last_delta_to_proto, sample_to_proto

Event = TextDelta | GenerationResponseSample

LOOSE: Final = 256
"""How many texts may wait one by one before they are joined."""


@dataclass(frozen=True, slots=True)
class Patience:
    """What a reader is granted.

    Attributes:
        max_bytes: Text that may wait for it, in bytes of UTF-8, give or take one event.
        when_full: Whether the engine then waits for the reader, or the stream ends.
        timeout: Seconds of running time in which it must have taken a message, give or take a quarter.
    """

    max_bytes: int
    when_full: Literal["wait", "end"]
    timeout: float


class Buffer(Protocol):
    """What waits for the reader of a stream."""

    size: int
    """The text in it, in bytes of UTF-8."""

    def add(self, event: Event) -> None:
        """Takes in an event."""

    def take(self) -> Iterable[Any]:
        """Returns the messages for all events that have come since it was last asked, and is empty again."""


async def deliver(
    events: AsyncIterator[Event], buffer: Buffer, write: Callable[[Any], Awaitable[None]], patience: Patience
) -> None:
    """Writes what the buffer makes of the events until they end; raises what they raise, after what came before it.

    Raises `SlowReaderError` if the reader is slower than patience allows.
    """
    await _Delivery(events, buffer, write, patience).run()


async def deliver_one(message: Any, write: Callable[[Any], Awaitable[None]], patience: Patience) -> None:  # noqa: ANN401
    """Writes a message; raises `SlowReaderError` if the reader takes longer than patience allows."""
    try:
        async with running_time.timeout(patience.timeout):
            await write(message)
    except TimeoutError as error:
        raise SlowReaderError from error


class _Delivery:
    """Two sides of a buffer: one that collects events, and one that writes messages, each waiting for the other."""

    def __init__(
        self, events: AsyncIterator[Event], buffer: Buffer, write: Callable[[Any], Awaitable[None]], patience: Patience
    ) -> None:
        self._events = events
        self._buffer = buffer
        self._write = write
        self._patience = patience
        self._clock = running_time.clock()
        self._something = asyncio.Event()
        self._room = asyncio.Event()
        self._overflown = False
        self._writing_since: float | None = None
        self._limit = asyncio.timeout(None)
        self._looking = self._look_later()

    async def run(self) -> None:
        collecting = asyncio.create_task(self._collect())
        collecting.add_done_callback(lambda _: self._something.set())
        try:
            async with self._limit:
                while self._something.is_set() or not collecting.done():
                    await self._something.wait()
                    self._something.clear()
                    await self._write_all()
            await collecting
        except TimeoutError as error:
            if not self._limit.expired():
                raise
            raise SlowReaderError from error
        finally:
            self._looking.cancel()
            collecting.cancel()
            await asyncio.gather(collecting, return_exceptions=True)

    async def _collect(self) -> None:
        async for event in self._events:
            before = self._buffer.size
            self._buffer.add(event)
            self._something.set()
            if self._buffer.size <= self._patience.max_bytes:
                continue
            if self._patience.when_full == "wait":
                self._room.clear()
                await self._room.wait()
            elif before:
                self._overflown = True
                running_time.expire(self._limit)
                raise SlowReaderError

    async def _write_all(self) -> None:
        messages = self._buffer.take()
        self._room.set()
        for message in messages:
            if self._overflown:
                raise SlowReaderError
            self._writing_since = self._clock.time()
            await self._write(message)
        self._writing_since = None

    def _look_later(self) -> running_time.Timer:
        # A look now and then, because a timer for each message would cost a tenth of what the message does.
        return self._clock.call_later(self._patience.timeout / 4, self._look)

    def _look(self) -> None:
        if self._writing_since is not None and self._clock.time() - self._writing_since >= self._patience.timeout:
            running_time.expire(self._limit)
        else:
            self._looking = self._look_later()


class SampleBuffer:
    """Whole samples, each a message."""

    def __init__(self) -> None:
        self.size = 0
        self._samples: list[GenerationResponseSample] = []

    def add(self, event: Event) -> None:
        """Takes in an event; deltas are not kept."""
        if isinstance(event, GenerationResponseSample):
            self._samples.append(event)
            self.size += len(event.text.encode())

    def take(self) -> Iterable[pb.GenerationResponseSample]:
        """Returns the messages, the sample that finished first before the others."""
        samples, self._samples = self._samples, []
        self.size = 0
        return map(sample_to_proto, samples)


@dataclass(slots=True)
class _Waiting:
    """What waits of one sample: the event that came last, and the text of all of them."""

    last: Event
    text: str
    more: list[str] = field(default_factory=list)

    def add(self, event: Event, text: str) -> None:
        self.last = event
        self.more.append(text)
        # Many small texts take many times the memory of one large.
        if len(self.more) == LOOSE:
            self.text = "".join((self.text, *self.more))
            self.more.clear()

    def message(self) -> pb.GenerationDelta:
        """Returns them as one."""
        text = "".join((self.text, *self.more)) if self.more else self.text
        if isinstance(self.last, GenerationResponseSample):
            return last_delta_to_proto(self.last, text)
        return delta_to_proto(self.last.index, text, self.last.generated_tokens)


class DeltaBuffer:
    """The text of all samples, each character once: of what has piled up, one message for each sample."""

    def __init__(self) -> None:
        self.size = 0
        self._waiting: dict[int, _Waiting] = {}
        # How many characters of each sample have come, which its finished text repeats.
        self._seen: dict[int, int] = {}

    def add(self, event: Event) -> None:
        """Takes in an event."""
        index = event.index
        seen = self._seen.get(index, 0)
        text = event.text if isinstance(event, TextDelta) else event.text[seen:]
        self._seen[index] = seen + len(text)
        self.size += len(text.encode())
        if waiting := self._waiting.get(index):
            waiting.add(event, text)
        else:
            self._waiting[index] = _Waiting(event, text)

    def take(self) -> Iterable[pb.GenerationDelta]:
        """Returns the messages, the sample whose event came first before the others."""
        waiting, self._waiting = self._waiting, {}
        self.size = 0
        return [each.message() for each in waiting.values()]
