"""Turns the events of a generation into the messages of a stream, at the pace of its reader and of the event loop.

A stream cannot write while its last message is being written, or while other streams write (`flywheel_server.write_scheduler`).
Events that arrive meanwhile wait in a buffer and are merged. A message costs far more than the text in it, so merging is what
lets a busy server keep up. If neither the reader nor the server is behind, every delta is sent at once, as its own message. If
the reader is behind, `ReaderPolicy` bounds the text that waits for it.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

from flywheel_proto.v1 import generation_pb2 as pb

from flywheel_server.engines.base import EngineFailedError, Event, OutputEvent, Sink, Started, TextDelta
from flywheel_server.engines.samples import FinishedSamplesSink
from flywheel_server.errors import SlowReaderError
from flywheel_server.messages import GenerationResponseSample, Token
from flywheel_server.translation import delta_to_proto, last_delta_to_proto, sample_to_proto
from flywheel_server.watchdog import Watchdog
from flywheel_server.write_scheduler import WriteScheduler

MAX_SEPARATE_TEXTS: Final = 256
"""Texts of one sample that wait separately before they are joined."""

BYTES_PER_LOGPROB: Final = 20
"""About how many bytes a token with its probability has in a message."""

MAX_LOGPROBS_ON_LOOP: Final = 2000
"""Probabilities for which a message is made on the event loop. More take over 2 ms, for which other calls would wait."""

Write = Callable[[Any], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class ReaderPolicy:
    """How slow the reader of a stream may be.

    Attributes:
        max_bytes: Text that may wait for the reader, in bytes of UTF-8. The last event may exceed it.
        when_full: What happens at that limit: the stream ends, or the engine pauses the generation. An engine that cannot pause
            generates on, so the text of all samples may wait.
        timeout: Seconds of running time in which the reader must take a message.
    """

    max_bytes: int
    when_full: Literal["wait", "end"]
    timeout: float


class Part(Protocol):
    """The events of a sample that make up one message."""

    @property
    def tokens(self) -> Sequence[Token]:
        """The tokens in the message."""

    def message(self) -> Any:  # noqa: ANN401 - any message
        """Returns the message. May be called in any thread."""


class Buffer(Protocol):
    """The events that wait to be written to a stream."""

    size: int
    """The text in the buffer, in bytes of UTF-8."""
    prompt_tokens: int
    """The number of tokens in the prompt; 0 while the engine does not know it."""

    def add(self, event: OutputEvent) -> bool:
        """Adds an event, and returns whether there is something to write."""

    def take(self) -> Sequence[Part]:
        """Removes all events, and returns what makes the messages for them."""


class Source(Protocol):
    """The generation that is delivered: `flywheel_server.generations.Generation`."""

    async def run(self, sink: Sink) -> None:
        """Emits the events to the sink, and returns after the last one."""

    def end(self, error: Exception) -> None:
        """Ends the generation: the task that delivers it raises the error."""


class Delivery:
    """Writes the output of generations to their readers, and ends generations whose readers are too slow."""

    def __init__(self, policy: ReaderPolicy) -> None:
        self._policy = policy
        self._scheduler = WriteScheduler()
        self._writes = Watchdog[Source](policy.timeout, lambda source: source.end(SlowReaderError()))
        """Times the write in progress of each generation."""

    async def deliver(self, source: Source, buffer: Buffer, begin: Callable[[], Awaitable[None]], write: Write) -> None:
        """Runs the source and writes its events, as the messages that the buffer makes of them.

        If the source fails, its error is raised once all earlier events have been written. If the reader is slower than the
        policy allows, the source is ended with `SlowReaderError`.

        Arguments:
            source: The generation.
            buffer: Merges events into messages.
            begin: Awaited when the engine starts, before the first message.
            write: Writes a message, and returns when the reader has room for the next one.
        """
        writes = self._writes
        stream = _Stream(source, buffer, self._policy, self._scheduler)
        generating = asyncio.create_task(source.run(stream))
        generating.add_done_callback(stream.wake)
        try:
            while not generating.done() or stream.has_news:
                await stream.may_write()
                if stream.has_started:
                    await begin()
                for part in stream.take():
                    if part.tokens and logprobs_in(part.tokens) > MAX_LOGPROBS_ON_LOOP:
                        message = await asyncio.to_thread(part.message)
                    else:
                        message = part.message()
                    writes.start(source)
                    await write(message)
                    writes.stop(source)
            if generating.cancelled():
                raise EngineFailedError("the engine cancelled itself")
            generating.result()
        finally:
            writes.stop(source)
            generating.cancel()
            # Not `gather`: that would raise the error of a generation that has failed.
            await asyncio.wait((generating,))

    async def deliver_one(self, source: Source, message: Any, write: Write) -> None:  # noqa: ANN401 - any message
        """Writes a single message. If the reader is slower than the policy allows, ends the source with `SlowReaderError`."""
        self._writes.start(source)
        try:
            await write(message)
        finally:
            self._writes.stop(source)


class _Stream:
    """Connects one generation, for which it is the sink, with the task that writes its messages."""

    def __init__(self, source: Source, buffer: Buffer, policy: ReaderPolicy, scheduler: WriteScheduler) -> None:
        self.is_full = False
        """Whether the engine should pause; see `Sink.is_full`."""
        self.has_started = False
        """Whether the engine has started since the last `take`."""
        self.has_news = False
        """Whether the engine has started, or there is something to write, since the last `take`."""
        self._source = source
        self._buffer = buffer
        self._policy = policy
        self._scheduler = scheduler
        # Kept, because `get_running_loop` makes a system call.
        self._loop = asyncio.get_running_loop()
        self._unrequested: asyncio.Future[None] | None = None
        """The permission that the writer awaits while there is nothing to write; None once it has been requested."""
        self._is_first = True
        self._over = False

    def emit(self, event: Event) -> None:
        """Adds an event to the buffer; see `Sink.emit`."""
        buffer = self._buffer
        before = buffer.size
        if isinstance(event, Started):
            self.has_started = True
            buffer.prompt_tokens = event.prompt_tokens
        elif not buffer.add(event):
            return
        self.has_news = True
        if self._unrequested is not None:
            self._request(self._unrequested)
        if buffer.size > self._policy.max_bytes:
            if self._policy.when_full == "wait":
                self.is_full = True
            elif before:  # else the reader is not behind: this event alone exceeds the limit
                self._source.end(SlowReaderError())

    def wake(self, generating: asyncio.Task[None]) -> None:
        """Wakes the writer, because there are no further events."""
        # asyncio logs an exception that is never retrieved, and a stream that ends early does not retrieve it.
        if not generating.cancelled():
            generating.exception()
        self._over = True
        if self._unrequested is not None:
            self._request(self._unrequested)

    def may_write(self) -> asyncio.Future[None]:
        """Returns a future that is done once it is the stream's turn to write, and it has news or the generation is over."""
        permission = self._unrequested = self._loop.create_future()
        if self.has_news or self._over:
            self._request(permission)
        return permission

    def _request(self, permission: asyncio.Future[None]) -> None:
        self._unrequested = None
        self._scheduler.request(permission, is_first=self._is_first)

    def take(self) -> Sequence[Part]:
        """Returns what makes the messages to write."""
        self.has_started = self.has_news = self.is_full = False
        parts = self._buffer.take()
        if parts:
            self._is_first = False
        return parts


def logprobs_in(tokens: Sequence[Token]) -> int:
    """Returns about how many probabilities a message with these tokens has. All tokens of a sample have equally many."""
    return len(tokens) * (1 + len(tokens[0].likeliest)) if tokens else 0


class _FinishedSample:
    """A sample that waits."""

    __slots__ = ("_sample", "tokens")

    def __init__(self, sample: GenerationResponseSample) -> None:
        self.tokens = sample.tokens
        self._sample = sample

    def message(self) -> pb.GenerationResponseSample:
        """Returns the sample as a message."""
        return sample_to_proto(self._sample)


class SampleBuffer:
    """Makes one message of each finished sample."""

    def __init__(self) -> None:
        self.size = 0
        self.prompt_tokens = 0
        self._samples: list[_FinishedSample] = []

    def add(self, event: OutputEvent) -> bool:
        """Adds a finished sample; ignores deltas."""
        if isinstance(event, TextDelta):
            return False
        self._samples.append(_FinishedSample(event))
        self.size += len(event.text.encode()) + BYTES_PER_LOGPROB * logprobs_in(event.tokens)
        return True

    def take(self) -> Sequence[_FinishedSample]:
        """Returns the samples, in the order in which they finished."""
        samples, self._samples = self._samples, []
        self.size = 0
        return samples


class SampleCollector(FinishedSamplesSink):
    """The sink of a generation that is answered with a single message, when it has finished.

    Arguments:
        begin: Called when the engine starts.
    """

    def __init__(self, begin: Callable[[], None]) -> None:
        super().__init__()
        self._begin = begin

    def emit(self, event: Event) -> None:
        """Keeps the event if it is a finished sample; see `Sink.emit`."""
        if isinstance(event, Started):
            self._begin()
        super().emit(event)


class _Pending:
    """The events of one sample that wait: the last event, and the texts and tokens of all.

    `prompt_tokens` is the number of tokens in the prompt for the first message of a sample, and 0 for the others.
    """

    __slots__ = ("last", "prompt_tokens", "texts", "tokens")

    def __init__(self, event: OutputEvent, text: str, tokens: Sequence[Token], prompt_tokens: int) -> None:
        self.last = event
        self.texts = [text]
        self.tokens = [*tokens]
        self.prompt_tokens = prompt_tokens

    def add(self, event: OutputEvent, text: str, tokens: Sequence[Token]) -> None:
        self.last = event
        self.texts.append(text)
        self.tokens.extend(tokens)
        # Many small texts take many times the memory of one large text.
        if len(self.texts) == MAX_SEPARATE_TEXTS:
            self.texts = ["".join(self.texts)]

    def message(self) -> pb.GenerationDelta:
        """Returns one message for all of them."""
        text = "".join(self.texts)
        if isinstance(self.last, TextDelta):
            message = delta_to_proto(self.last.index, text, self.last.generated_tokens, self.tokens)
            message.prompt_tokens = self.prompt_tokens
            return message
        return last_delta_to_proto(self.last, text, self.tokens)


class DeltaBuffer:
    """Merges the waiting events of each sample into one message. Each character and token of a sample is sent once."""

    def __init__(self) -> None:
        self.size = 0
        self.prompt_tokens = 0
        self._pending: dict[int, _Pending] = {}
        self._seen: dict[int, int] = {}
        """Characters of each sample that were added as deltas; the text of the finished sample repeats them."""
        self._seen_tokens: dict[int, int] = {}
        """Tokens of each sample that were added as deltas; the finished sample repeats them."""

    def add(self, event: OutputEvent) -> bool:
        """Adds an event."""
        index = event.index
        seen = self._seen.get(index)
        text = event.text if isinstance(event, TextDelta) else event.text[seen or 0 :]
        self._seen[index] = (seen or 0) + len(text)
        self.size += len(text) if text.isascii() else len(text.encode())
        tokens = self._new_tokens(event) if event.tokens else ()
        if pending := self._pending.get(index):
            pending.add(event, text, tokens)
        else:
            self._pending[index] = _Pending(event, text, tokens, self.prompt_tokens if seen is None else 0)
        return True

    def _new_tokens(self, event: OutputEvent) -> Sequence[Token]:
        """Returns the tokens of the event that were not added before, and adds them to the size."""
        seen = self._seen_tokens.get(event.index, 0)
        tokens = event.tokens if isinstance(event, TextDelta) else event.tokens[seen:]
        self._seen_tokens[event.index] = seen + len(tokens)
        self.size += BYTES_PER_LOGPROB * logprobs_in(tokens)
        return tokens

    def take(self) -> Sequence[_Pending]:
        """Returns the pending events of each sample, in the order of the sample's first one."""
        pending, self._pending = self._pending, {}
        self.size = 0
        return [*pending.values()]
