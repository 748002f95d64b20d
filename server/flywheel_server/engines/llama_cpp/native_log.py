"""llama.cpp's log in ours. It writes to file descriptor 2 and offers no callback, so its lines are read back from there.

What is not a line of llama.cpp's passes through unchanged.
"""

import logging
import re
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Final

from flywheel_server.system import output
from flywheel_server.system.output import Output

log = logging.getLogger("llama.cpp")

# For example `0.00.403.400 W srv          stop: cancel task, id_task = 3`.
_LINE: Final = re.compile(rb"(?:\x1b\[\d*m)*[\d.]+ (?:\x1b\[\d*m)*(?P<level>[DIWE]) (?P<text>.*)")
_LEVELS: Final = {b"E": logging.ERROR, b"W": logging.WARNING, b"I": logging.DEBUG, b"D": logging.DEBUG}
_COLOR: Final = re.compile(r"\x1b\[\d*m")

# What llama.cpp warns of although it happens every day: a completion is cancelled, a prompt is in its cache, an idle slot gives
# its room to another one.
_ORDINARY: Final = re.compile(
    "stop: cancel task|need to evaluate at least 1 token|n_past was set to"
    "|failed to find a memory slot|purging slot|failed to find free space in the KV cache"
)

_LAST_LINE: Final = "exiting due to model loading error"
"""What llama.cpp says last if it cannot load a model."""

LAST_LINE_TIMEOUT: Final = 5.0
"""Seconds to wait for that."""

_Records = SimpleQueue[tuple[int, str] | None]


def verbosity() -> int:
    """Returns how much llama.cpp must log for what our log shows: warnings, or everything."""
    return 4 if log.isEnabledFor(logging.DEBUG) else 2


class Errors:
    """The lines that llama.cpp has logged as errors; those without a level go on with the one before."""

    def __init__(self) -> None:
        self.lines: deque[str] = deque(maxlen=100)
        self._continues = False
        self._has_ended = threading.Event()

    def add(self, level: bytes | None, text: str) -> None:
        """Note a line of the log."""
        self._continues = level == b"E" or (level is None and self._continues)
        if self._continues:
            self.lines.append(text)
        if _LAST_LINE in text:
            self._has_ended.set()

    def wait_for_last(self) -> None:
        """Wait until llama.cpp has said all about a start that failed: it logs on a thread of its own, which may be behind."""
        self._has_ended.wait(LAST_LINE_TIMEOUT)


@contextmanager
def captured() -> Iterator[Errors]:
    """Logs what llama.cpp writes, for the length of the context, at the level it has there; its information is our debug.

    Gives its last errors.
    """
    errors = Errors()
    records: _Records = SimpleQueue()
    # On a thread of its own, because whoever logs may write to descriptor 2 itself: the one that empties the pipe must not wait
    # for that.
    writer = threading.Thread(target=_write, args=(records,), name="llama.cpp log", daemon=True)
    others = Output(2)
    try:
        writer.start()
        try:
            with output.captured(2, lambda line: _sort(line, records, others, errors)):
                yield errors
        finally:
            records.put(None)
            writer.join(timeout=1)
    finally:
        others.close()


def _sort(line: bytes, records: _Records, others: Output, errors: Errors) -> None:
    match = _LINE.match(line)
    text = _COLOR.sub("", (match["text"] if match else line).decode(errors="replace")).rstrip()
    errors.add(match and match["level"], text)
    if match:
        records.put((logging.DEBUG if _ORDINARY.search(text) else _LEVELS[match["level"]], text))
    else:
        others.write(line)


def _write(records: _Records) -> None:
    while record := records.get():
        log.log(record[0], "%s", record[1])
