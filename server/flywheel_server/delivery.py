"""From the events of a generation to the messages of a stream, at the pace of who reads them and of the event loop.

What comes while a stream cannot write waits in a buffer, and leaves it merged: a message costs far more than the text in it, so
this is what carries the load when there is much. A stream cannot write while its last message is being written, and while it is
not its turn (`flywheel_server.turns`). A reader that keeps up, on a server that is not busy, gets every delta on its own and
without delay. A reader that does not keep up is waited for, with a bound on what piles up meanwhile.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol

from flywheel_proto.v1 import generation_pb2 as pb

from flywheel_server import running_time
from flywheel_server.engines.base import Event, Sink, Started, TextDelta
from flywheel_server.errors import SlowReaderError
from flywheel_server.messages import GenerationResponseSample
from flywheel_server.translation import delta_to_proto, last_delta_to_proto, sample_to_proto
from flywheel_server.turns import Turns

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
        self._turns = Turns()
        self._readers = _Readers(policy.timeout)

    async def deliver(self, source: Source, buffer: Buffer, begin: Callable[[], Awaitable[None]], write: Write) -> None:
        """Writes what the buffer makes of the events until they end; raises what they raise, after what came before it.

        `begin` is awaited once the engine has begun. If the reader is slower than the policy allows, the source is ended with
        `SlowReaderError`.
        """
        stream = _Stream(source, buffer, self._policy, self._turns)
        generating = asyncio.create_task(source.run(stream))
        generating.add_done_callback(stream.wake)
        try:
            while not generating.done() or stream.has_news:
                await stream.turn()
                if stream.is_beginning():
                    await begin()
                for message in stream.take():
                    await self._readers.wait_for(source, write(message))
            generating.result()
        finally:
            generating.cancel()
            # Not `gather`, which would raise the error of a generation that has failed by itself.
            await asyncio.wait((generating,))

    async def deliver_one(self, source: Source, message: Any, write: Write) -> None:  # noqa: ANN401 - any message
        """Writes a message. If the reader takes longer than the policy allows, the source is ended with `SlowReaderError`."""
        await self._readers.wait_for(source, write(message))


class _Stream:
    """The sink for the events of one generation, and the side that its writer sees."""

    def __init__(self, source: Source, buffer: Buffer, policy: ReaderPolicy, turns: Turns) -> None:
        self._source = source
        self._buffer = buffer
        self._policy = policy
        self._turns = turns
        self._turn: asyncio.Future[None] | None = None
        """What the writer waits for, until it is asked for."""
        self._begins = False
        self._is_first = True
        self._over = False
        self.has_news = False
        """Whether the engine has begun or there is something to write."""

    @property
    def is_full(self) -> bool:
        """Whether the engine is to wait for the reader."""
        return self._buffer.size > self._policy.max_bytes and self._policy.when_full == "wait"

    def emit(self, event: Event) -> None:
        """Takes in an event."""
        had_text = self._buffer.size > 0
        if isinstance(event, Started):
            self._begins = self.has_news = True
            self._ask()
        elif self._buffer.add(event):
            self.has_news = True
            self._ask()
        if had_text and self._buffer.size > self._policy.max_bytes and self._policy.when_full == "end":
            self._source.end(SlowReaderError())

    def wake(self, generating: asyncio.Task[None]) -> None:
        """Wakes the writer: there are no further events."""
        # Asyncio complains of an error that nobody looks at, and a stream that ends early does not.
        generating.cancelled() or generating.exception()
        self._over = True
        self._ask()

    async def turn(self) -> None:
        """Returns when the stream may write, and has something to write or to end for."""
        self._turn = asyncio.get_running_loop().create_future()
        turn = self._turn
        if self.has_news or self._over:
            self._ask()
        await turn

    def _ask(self) -> None:
        if self._turn is not None:
            self._turns.ask(self._turn, is_first=self._is_first)
            self._turn = None

    def is_beginning(self) -> bool:
        """Returns whether the engine has begun since this was last asked."""
        begins, self._begins = self._begins, False
        return begins

    def take(self) -> Sequence[Any]:
        """Returns the messages to write."""
        self.has_news = False
        messages = self._buffer.take()
        self._is_first = self._is_first and not messages
        return messages


class _Readers:
    """Looks a few times in each timeout for messages that take too long, as a timer for each costs a tenth of a message."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._since: dict[Source, float] = {}
        self._looking = False

    async def wait_for(self, source: Source, writing: Awaitable[None]) -> None:
        """Returns when the message has been written. Ends the source with `SlowReaderError` if that takes too long."""
        clock = running_time.clock()
        self._since[source] = clock.time()
        if not self._looking:
            self._look_later(clock)
        try:
            await writing
        finally:
            del self._since[source]

    def _look_later(self, clock: running_time.Clock) -> None:
        self._looking = True
        clock.call_later(self._timeout / 4, lambda: self._look(clock))

    def _look(self, clock: running_time.Clock) -> None:
        now = clock.time()
        for source, since in self._since.items():
            if now - since >= self._timeout:
                source.end(SlowReaderError())
        self._looking = False
        if self._since:
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
        self.size += _utf8_bytes(event.text)
        return True

    def take(self) -> Sequence[pb.GenerationResponseSample]:
        """Returns the messages, the sample that finished first before the others."""
        samples, self._samples = self._samples, []
        self.size = 0
        return [sample_to_proto(sample) for sample in samples]


class WholeBuffer:
    """Whole samples, kept for a single answer: there is nothing to write until the generation has ended."""

    def __init__(self) -> None:
        self.size = 0
        self.samples: list[GenerationResponseSample] = []

    def add(self, event: Progress) -> bool:
        """Takes in an event; deltas are not kept."""
        if isinstance(event, GenerationResponseSample):
            self.samples.append(event)
        return False

    def take(self) -> Sequence[Any]:
        """Returns no messages."""
        return ()


@dataclass(slots=True)
class _Waiting:
    """What waits of one sample: the event that came last, and the text of all of them."""

    last: Progress
    text: str
    more: list[str] = field(default_factory=list)

    def add(self, event: Progress, text: str) -> None:
        self.last = event
        self.more.append(text)
        # Many small texts take many times the memory of one large.
        if len(self.more) == MAX_SEPARATE_TEXTS:
            self.text = "".join((self.text, *self.more))
            self.more.clear()

    def message(self) -> pb.GenerationDelta:
        """Returns them as one."""
        text = "".join((self.text, *self.more)) if self.more else self.text
        if isinstance(self.last, TextDelta):
            return delta_to_proto(self.last.index, text, self.last.generated_tokens)
        return last_delta_to_proto(self.last, text)


class DeltaBuffer:
    """The text of all samples, each character once: of what has piled up, one message for each sample."""

    def __init__(self) -> None:
        self.size = 0
        self._waiting: dict[int, _Waiting] = {}
        # How many characters of each sample have come, which its finished text repeats.
        self._seen: dict[int, int] = {}

    def add(self, event: Progress) -> bool:
        """Takes in an event."""
        index = event.index
        seen = self._seen.get(index, 0)
        text = event.text if isinstance(event, TextDelta) else event.text[seen:]
        self._seen[index] = seen + len(text)
        self.size += _utf8_bytes(text)
        if waiting := self._waiting.get(index):
            waiting.add(event, text)
        else:
            self._waiting[index] = _Waiting(event, text)
        return True

    def take(self) -> Sequence[pb.GenerationDelta]:
        """Returns the messages, the sample whose event came first before the others."""
        waiting, self._waiting = self._waiting, {}
        self.size = 0
        return [each.message() for each in waiting.values()]


def _utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())
