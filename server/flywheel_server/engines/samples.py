"""What every engine does with the text of a sample: it finds stop sequences, and turns pieces of text into events.

Tokens may split a stop sequence anywhere. Each character of the text is sent once.
"""

import codecs
import time
from collections.abc import Callable, Sequence
from typing import Final

from flywheel_server.engines.base import Event, TextDelta
from flywheel_server.messages import GenerationResponseSample, Token


class StopGate:
    """Passes text on up to the first stop sequence, and holds back only text that may still become a stop sequence.

    The first stop sequence is the one whose last character comes first. If two stop sequences end with the same character,
    it is the longer one. So the result does not depend on how the text is cut into pieces.

    Attributes:
        matched: The stop sequence that was found; empty until then.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = stop
        self._held = ""
        self.matched = ""

    def feed(self, text: str) -> str:
        """Takes the next piece of text; returns the text that may be sent now. Sets `matched` if it finds a stop sequence."""
        if not self._stop:
            return text
        text = self._held + text
        ends = [(start + len(stop), start, stop) for stop in self._stop if (start := text.find(stop)) >= 0]
        if ends:
            _, start, self.matched = min(ends)
            self._held = ""
            return text[:start]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """Returns the text that is still held back, at the end of the sample."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Returns the length of the longest suffix of `text` that is a proper prefix of `stop`."""
    return next((length for length in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:length])), 0)


_Decoder: Final = codecs.getincrementaldecoder("utf-8")


class GrowingSample:
    """One sample that is being generated. Turns the engine's pieces of text into events, and calls `emit` with each event.

    Attributes:
        finished: Whether the finished sample was emitted.

    Arguments:
        index: The index of the sample.
        prompt_tokens: How many tokens of the prompt the engine reads.
        stop: The stop sequences of the request.
        emit: Called with each event.
        seed: The seed of the sample; 0 if the engine has no seeds.
    """

    def __init__(
        self, index: int, prompt_tokens: int, stop: Sequence[str], emit: Callable[[Event], object], *, seed: int = 0
    ) -> None:
        self.finished = False
        self._index = index
        self._prompt_tokens = prompt_tokens
        self._gate = StopGate(stop)
        self._has_gate = bool(stop)
        self._sent: list[str] = []
        self._emit = emit
        self._seed = seed
        self._tokens: list[Token] = []
        self._sent_tokens = 0
        """How many of the tokens the deltas have carried."""
        self._ends: list[int] = []
        """For each token, how many bytes of text there are up to the end of its last character."""
        self._decoder = _Decoder("replace")
        self._decoded_bytes = 0
        self._sent_bytes = 0

    def add(self, text: str, generated_tokens: int, tokens: Sequence[Token] = ()) -> None:
        """Takes the next piece of text. Emits a delta if text may be sent, and the sample if a stop sequence ends it.

        `tokens` are the tokens of the text, if the request asks for them.
        """
        if tokens:
            self._keep(tokens)
        # Each token of each stream comes here, and most requests have no stop sequence.
        self._send(self._gate.feed(text) if self._has_gate else text, generated_tokens)
        if self._has_gate and self._gate.matched:
            self._finish("stop", generated_tokens)

    def end(self, finish_reason: str, generated_tokens: int, tokens: Sequence[Token] = ()) -> None:
        """Emits the text that is still held back, and the finished sample. `tokens` are the tokens that have ended it."""
        self._send(self._gate.flush(), generated_tokens)
        self._tokens += tokens
        self._finish(finish_reason, generated_tokens)

    def _send(self, text: str, generated_tokens: int) -> None:
        if text:
            self._sent.append(text)
            self._emit(TextDelta(self._index, text, generated_tokens, self._tokens_of(text) if self._tokens else ()))

    def _keep(self, tokens: Sequence[Token]) -> None:
        self._tokens += tokens
        for token in tokens:
            # Bytes that are no UTF-8 are longer in the text, as replacement characters.
            self._decoded_bytes += len(self._decoder.decode(token.text).encode())
            is_within_character = bool(self._decoder.getstate()[0])
            self._ends.append(self._decoded_bytes + is_within_character)

    def _tokens_of(self, text: str) -> Sequence[Token]:
        """Returns the tokens that the next delta carries: those whose text ends within the text of this delta."""
        start = self._sent_tokens
        self._sent_bytes += len(text.encode())
        while self._sent_tokens < len(self._ends) and self._ends[self._sent_tokens] <= self._sent_bytes:
            self._sent_tokens += 1
        return self._tokens[start : self._sent_tokens]

    def _finish(self, finish_reason: str, generated_tokens: int) -> None:
        self.finished = True
        self._emit(
            GenerationResponseSample(
                text="".join(self._sent),
                generated_tokens=generated_tokens,
                finished=time.time(),
                finish_reason=finish_reason,
                index=self._index,
                prompt_tokens=self._prompt_tokens,
                stop_sequence=self._gate.matched,
                seed=self._seed,
                tokens=tuple(self._tokens),
            )
        )


class FinishedSamplesSink:
    """A sink that keeps the finished samples, and drops all other events."""

    is_full = False

    def __init__(self) -> None:
        self.finished: list[GenerationResponseSample] = []

    def emit(self, event: Event) -> None:
        """Keeps the event if it is a finished sample."""
        if isinstance(event, GenerationResponseSample):
            self.finished.append(event)
