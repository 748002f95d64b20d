"""Writes the output of the command `flywheel`.

On a terminal, standard output makes the text of a model safe (`flywheel_proto._streams`). In a pipe or file, the text stays
unchanged. Standard error quotes text of a model only in errors and summaries, and always makes it safe.
"""

import json
import math
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TextIO

from flywheel_proto._streams import BOLD, DIM, write_styled
from flywheel_proto._visible import one_line, visible

from flywheel_client._errors import FlywheelError, InvalidArgumentError, ResourceExhaustedError
from flywheel_client._records import Endpoint
from flywheel_client._results import Delta, Token
from flywheel_client._token_table import token_table


class Output:
    """Writes text without delay, and knows whether the current line is empty."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.is_terminal = stream.isatty()
        self.line_is_open = False

    def write(self, text: str) -> None:
        """Writes text of a model."""
        if text:
            # First, because the handler of a signal may interrupt the rest, and ask.
            self.line_is_open = not text.endswith("\n")
            self._stream.write(text)
            self._stream.flush()

    def end_line(self) -> None:
        """Begins a new line, unless the current line is empty."""
        if self.line_is_open:
            self.write("\n")

    def heading(self, text: str) -> None:
        """Writes a heading on its own line, bold on a terminal."""
        self.end_line()
        write_styled(self._stream, text, BOLD)
        self._stream.write("\n")


@dataclass(slots=True)
class _Progress:
    """The part of one sample that has arrived. Times are seconds since the call began."""

    pending: list[str] = field(default_factory=list)
    first_text: float | None = None
    tokens_at_first_text: int = 0
    last: float = 0.0
    tokens: list[Token] = field(default_factory=list)
    end: Delta | None = None


class SampleWriter:
    """Writes samples one after another, in the order of their index, although their deltas arrive interleaved.

    The first unfinished sample is written as it is generated. The text of later samples waits until their turn. So written text
    never moves, and all of it stays in the terminal's history.
    """

    def __init__(self, output: Output, num_samples: int) -> None:
        self._output = output
        self._num_samples = num_samples
        self._samples: dict[int, _Progress] = {}
        self._current = -1

    def add(self, delta: Delta, seconds: float) -> None:
        """Takes the next delta. `seconds` is the time from the start of the call to the delta's arrival."""
        sample = self._samples.setdefault(delta.index, _Progress())
        if delta.text and sample.first_text is None:
            sample.first_text = seconds
            sample.tokens_at_first_text = delta.generated_tokens
        sample.last = seconds
        sample.pending.append(delta.text)
        sample.tokens.extend(delta.tokens)
        if delta.finish_reason:
            sample.end = delta
        if self._current < 0:
            self._begin(0)
        self._write_pending()
        while (current := self._samples.get(self._current)) and current.end and self._current + 1 in self._samples:
            self._begin(self._current + 1)
            self._write_pending()

    def finish(self) -> None:
        """Flushes the text that still waits. There is such text only if the call ended early."""
        for index in sorted(self._samples):
            if self._samples[index].pending:
                if index != self._current:
                    self._begin(index)
                self._write_pending()
        if self._output.is_terminal or self._num_samples > 1:
            self._output.end_line()

    def summary(self) -> Iterator[str]:
        """Yields a line for each finished sample: its tokens, why it ended, the time to its first text, and its speed.

        A table of the tokens follows if the deltas had them. On a terminal, its lines are cut to fit.
        """
        columns = shutil.get_terminal_size().columns if sys.stderr.isatty() else None
        for index, sample in sorted(self._samples.items()):
            if (end := sample.end) is None:
                continue
            facts = [
                f"{end.generated_tokens} tokens (prompt {end.prompt_tokens})",
                f"{end.finish_reason} {json.dumps(end.stop_sequence)}" if end.stop_sequence else end.finish_reason,
            ]
            if sample.first_text is not None:
                facts.append(f"first text {sample.first_text:.2f} s")
                tokens, seconds = end.generated_tokens - sample.tokens_at_first_text, sample.last - sample.first_text
                if tokens > 0 and seconds > 0:
                    facts.append(f"{tokens / seconds:.1f} tokens/s")
            name = f"sample {index}: " if self._num_samples > 1 else ""
            yield name + ", ".join(facts)
            if sample.tokens:
                yield from token_table(sample.tokens, columns)

    def _begin(self, index: int) -> None:
        if self._num_samples > 1:
            if self._current >= 0:
                self._output.end_line()
                self._output.write("\n")
            self._output.heading(f"── sample {index} ──")
        self._current = index

    def _write_pending(self) -> None:
        if current := self._samples.get(self._current):
            self._output.write("".join(current.pending))
            current.pending.clear()


def show_aside(lines: Iterable[str]) -> None:
    """Writes lines to stderr, dim on a terminal, so that users can tell them from the text."""
    for line in lines:
        write_styled(sys.stderr, visible(one_line(line)), DIM)
        sys.stderr.write("\n")


def show(line: str) -> None:
    """Writes a line to stdout."""
    Output(sys.stdout).write(f"{one_line(line)}\n")


def show_table(rows: Iterable[tuple[str, object]]) -> None:
    """Writes names and values in two columns to stdout."""
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        show(f"{name.ljust(width)}  {value}")


def show_endpoints(endpoints: Iterable[Endpoint], now: float) -> None:
    """Writes a table of endpoints, with ages at the time `now`. On a terminal, cuts the ids of containers to fit."""
    table = [("ADDRESS", "KIND", "AGE", "REFRESHED", "CONTAINER")]
    table += [(it.address, it.kind, _ago(it.started, now), _ago(it.refreshed, now), it.container or "-") for it in endpoints]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)][:-1]
    room = shutil.get_terminal_size().columns - sum(widths) - 2 * len(widths)
    for *cells, container in table:
        cut = sys.stdout.isatty() and len(container) > room
        last = container[: max(room - 1, 0)] + "…" if cut else container
        show("  ".join([*(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)), last]))


def _ago(then: float | None, now: float) -> str:
    """Returns the time since `then`, in the largest unit of which it has at least two; "-" if `then` is None."""
    if then is None:
        return "-"
    seconds = max(round(now - then), 0)
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length}{unit}"
    return f"{seconds}s"


def show_json(value: object) -> None:
    """Writes a value as one line of JSON to stdout."""
    sys.stdout.write(json_text(value) + "\n")
    sys.stdout.flush()


def json_text(value: object) -> str:
    """Returns a value as one line of JSON in ASCII, which is safe on a terminal and correct in any encoding.

    JSON has no numbers for infinity and NaN. They become the strings "Infinity", "-Infinity" and "NaN", as in protobuf's JSON.
    """
    return json.dumps(_finite(value), allow_nan=False)


def _finite(value: object) -> object:
    match value:
        case dict():
            return {key: _finite(each) for key, each in value.items()}
        case list() | tuple():
            return [_finite(each) for each in value]
        case float() if math.isnan(value):
            return "NaN"
        case float() if math.isinf(value):
            return "Infinity" if value > 0 else "-Infinity"
        case _:
            return value


def show_error(message: str) -> None:
    """Writes the error of the command to stderr."""
    sys.stderr.write(visible(f"flywheel: {message}") + "\n")


def describe(error: FlywheelError, advice: str) -> str:
    """Returns the text of an error: the status, each violation and quota on its own line, the advice, and the request id."""
    lines = [f"{error.code.name}: {error.message}"]
    if isinstance(error, InvalidArgumentError) and error.violations:
        if all(violation.description in error.message for violation in error.violations):
            lines = [f"{error.code.name}:"]
        lines += [f"{violation.field} {violation.description}" for violation in error.violations]
    if advice:
        lines.append(advice)
    if isinstance(error, ResourceExhaustedError):
        quotas = (quota for quota in error.quota_violations if quota.description not in error.message)
        lines += [f"{quota.subject}: {quota.description}" for quota in quotas]
    if error.retry_delay is not None:
        # Rounds up, because a retry that is too early fails.
        lines.append(f"Try again in {math.ceil(error.retry_delay * 10) / 10:g} s.")
    if error.request_id:
        lines.append(f"request id: {error.request_id}")
    return "\n  ".join(map(one_line, lines))
