"""How the text of a sample grows: stop sequences found wherever tokens split them, and every character sent once.

Engines differ in where their text comes from; what may be sent of it, and when, is the same for all, and is here.
"""

import time
from collections.abc import Callable, Sequence

from flywheel_server.engines.base import Event, TextDelta
from flywheel_server.messages import GenerationResponseSample


class StopGate:
    """Lets text through up to the first stop sequence, holding back only what may still become one.

    The first stop sequence is the one that is complete first; of two that are complete with the same character, the
    longer one. So what passes does not depend on how the text is cut into pieces.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = stop
        self._held = ""
        self.matched = ""

    def feed(self, text: str) -> str:
        """Returns what may be sent now that `text` has come; after that, `matched` is the stop sequence found, if any."""
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
        """Returns the text that was held back, now that nothing more will come."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Returns the length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    return next((length for length in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:length])), 0)


class GrowingSample:
    """One sample while it is made: turns the engine's pieces of text into the events of `engines.base`, which it emits."""

    def __init__(self, index: int, prompt_tokens: int, stop: Sequence[str], emit: Callable[[Event], object]) -> None:
        self.finished = False
        self._index = index
        self._prompt_tokens = prompt_tokens
        self._gate = StopGate(stop) if stop else None
        self._sent: list[str] = []
        self._emit = emit

    def add(self, text: str, generated_tokens: int) -> None:
        """Emits what follows from the next piece of text: a delta, and the finished sample if a stop sequence ended it."""
        if self._gate is None:
            self._send(text, generated_tokens)
            return
        self._send(self._gate.feed(text), generated_tokens)
        if self._gate.matched:
            self._finish("stop", generated_tokens)

    def end(self, finish_reason: str, generated_tokens: int) -> None:
        """Emits what was still held back, and the finished sample."""
        if self._gate is not None:
            self._send(self._gate.flush(), generated_tokens)
        self._finish(finish_reason, generated_tokens)

    def _send(self, text: str, generated_tokens: int) -> None:
        if text:
            self._sent.append(text)
            self._emit(TextDelta(self._index, text, generated_tokens))

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
                stop_sequence=self._gate.matched if self._gate is not None else "",
            )
        )


class Samples:
    """A sink that keeps the finished samples, and nothing else."""

    is_full = False

    def __init__(self) -> None:
        self.finished: list[GenerationResponseSample] = []

    def emit(self, event: Event) -> None:
        """Keeps the event if it is a finished sample."""
        if isinstance(event, GenerationResponseSample):
            self.finished.append(event)
