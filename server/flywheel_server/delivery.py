"""From the events of a generation to the messages of a stream, at the pace of who reads them.

What comes while a message is being written waits in a buffer, and leaves it merged: a message costs far more than the text in
it, so this is what carries the load when there is much. A reader that keeps up gets every delta on its own and without delay;
one that does not is waited for, with a bound on what piles up meanwhile.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field, replace
from io import StringIO
from typing import Any, Literal, Protocol

from flywheel_proto.v1 import generation_pb2 as pb

from flywheel_server.engines.base import TextDelta
from flywheel_server.errors import SlowReaderError
from flywheel_server.messages import GenerationResponseSample
from flywheel_server.translation import delta_to_proto, last_delta_to_proto, sample_to_proto

Event = TextDelta | GenerationResponseSample


@dataclass(frozen=True, slots=True)
class Patience:
    """What a reader is granted.

    Attributes:
        max_bytes: Text that may wait for it, in bytes of UTF-8. One event may have more.
        when_full: Whether the engine then waits for the reader, or the stream ends.
        timeout: Seconds in which it must have taken a message.
    """

    max_bytes: int
    when_full: Literal["wait", "end"]
    timeout: float


class Buffer(Protocol):
    """What waits for the reader of a stream."""

    size: int
    """The text in it, in bytes of UTF-8."""

    def adds(self, event: Event) -> int:
        """Returns by how much an event would make it larger."""

    def add(self, event: Event) -> None:
        """Takes in an event."""

    def take(self) -> Iterable[Any]:
        """Returns the messages for all events that have come since it was last asked, and is empty again."""


async def deliver(
    events: AsyncIterator[Event], buffer: Buffer, write: Callable[[Any], Awaitable[None]], patience: Patience
) -> None:
    """Writes what the buffer makes of the events until they end; raises what they raise, after what came before it.

    Raises `SlowReaderError` where the reader is slower than patience allows.
    """
    clock = asyncio.get_running_loop().time
    something = asyncio.Event()
    room = asyncio.Event()
    limit = asyncio.timeout(None)
    overflown = False

    async def collect() -> None:
        nonlocal overflown
        async for event in events:
            while buffer.size and buffer.size + buffer.adds(event) > patience.max_bytes:
                if patience.when_full == "end":
                    overflown = True
                    limit.reschedule(clock())
                    return
                room.clear()
                await room.wait()
            buffer.add(event)
            something.set()

    collecting = asyncio.create_task(collect())
    collecting.add_done_callback(lambda _: something.set())
    try:
        async with limit:
            while something.is_set() or not collecting.done():
                await something.wait()
                something.clear()
                messages = buffer.take()
                room.set()
                for message in messages:
                    if overflown:
                        raise SlowReaderError
                    limit.reschedule(clock() + patience.timeout)
                    await write(message)
                limit.reschedule(None)
        await collecting
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise SlowReaderError from error
    finally:
        collecting.cancel()
        await asyncio.gather(collecting, return_exceptions=True)


class SampleBuffer:
    """Whole samples, each a message."""

    def __init__(self) -> None:
        self.size = 0
        self._samples: list[GenerationResponseSample] = []

    def adds(self, event: Event) -> int:
        """Returns the length of a sample; a delta is not kept."""
        return len(event.text.encode()) if isinstance(event, GenerationResponseSample) else 0

    def add(self, event: Event) -> None:
        """Takes in an event."""
        if isinstance(event, GenerationResponseSample):
            self._samples.append(event)
            self.size += self.adds(event)

    def take(self) -> Iterable[pb.GenerationResponseSample]:
        """Returns the messages, the sample that finished first before the others."""
        samples, self._samples = self._samples, []
        self.size = 0
        return map(sample_to_proto, samples)


@dataclass(slots=True)
class _Waiting:
    """What waits of one sample: the event that came last, and the text of all of them."""

    last: Event
    text: StringIO = field(default_factory=StringIO)

    def message(self) -> pb.GenerationDelta:
        """Returns them as one."""
        text = self.text.getvalue()
        if isinstance(self.last, GenerationResponseSample):
            return last_delta_to_proto(self.last, text)
        return delta_to_proto(replace(self.last, text=text))


class DeltaBuffer:
    """The text of all samples, each character once: of what has piled up, one message for each sample."""

    def __init__(self) -> None:
        self.size = 0
        self._waiting: dict[int, _Waiting] = {}
        # How many characters of each sample have come, which its finished text repeats.
        self._seen: dict[int, int] = {}

    def adds(self, event: Event) -> int:
        """Returns the length of the text in an event that did not come before."""
        return len(self._new(event).encode())

    def add(self, event: Event) -> None:
        """Takes in an event."""
        text = self._new(event)
        waiting = self._waiting.get(event.index)
        if waiting is None:
            waiting = self._waiting[event.index] = _Waiting(event)
        waiting.last = event
        waiting.text.write(text)
        self._seen[event.index] = self._seen.get(event.index, 0) + len(text)
        self.size += len(text.encode())

    def take(self) -> Iterable[pb.GenerationDelta]:
        """Returns the messages, the sample whose event came first before the others."""
        waiting, self._waiting = self._waiting, {}
        self.size = 0
        return [each.message() for each in waiting.values()]

    def _new(self, event: Event) -> str:
        return event.text if isinstance(event, TextDelta) else event.text[self._seen.get(event.index, 0) :]
