"""Copies llama.cpp's log into the server's log.

llama.cpp writes to file descriptor 2 (standard error) and offers no callback, so its lines are read back from there. Lines of
others are written to standard error unchanged.
"""

import logging
import re
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import closing, contextmanager
from queue import SimpleQueue
from typing import Final

from flywheel_server.system import output
from flywheel_server.system.output import Output

log = logging.getLogger("llama.cpp")

# For example `0.00.403.400 W srv          stop: cancel task, id_task = 3`.
_LINE: Final = re.compile(rb"(?:\x1b\[\d*m)*[\d.]+ (?:\x1b\[\d*m)*(?P<level>[DIWE]) (?P<text>.*)")
_LEVELS: Final = {b"E": logging.ERROR, b"W": logging.WARNING, b"I": logging.DEBUG, b"D": logging.DEBUG}
_COLOR: Final = re.compile(r"\x1b\[\d*m")

# Warnings about ordinary events: a completion is cancelled, a prompt is in the cache, an idle slot is cleared for another one.
_ORDINARY: Final = re.compile(
    "stop: cancel task|need to evaluate at least 1 token|n_past was set to"
    "|failed to find a memory slot|purging slot|failed to find free space in the KV cache"
)

_LAST_LINE: Final = "exiting due to model loading error"
"""In the last line that llama.cpp logs if it cannot load a model."""

LAST_LINE_TIMEOUT: Final = 5.0
"""Seconds to wait for `_LAST_LINE`."""

_Records = SimpleQueue[tuple[int, str] | None]


def verbosity() -> int:
    """Returns the verbosity of llama.cpp that the level of our log needs: everything for debug, otherwise warnings."""
    return 4 if log.isEnabledFor(logging.DEBUG) else 2


class Errors:
    """The last lines that llama.cpp has logged as errors. A line without a level continues the line before it."""

    def __init__(self) -> None:
        self.lines: deque[str] = deque(maxlen=100)
        self._continues = False
        self._last_line_seen = threading.Event()

    def add(self, level: bytes | None, text: str) -> None:
        """Takes a line of the log."""
        self._continues = level == b"E" or (level is None and self._continues)
        if self._continues:
            self.lines.append(text)
        if _LAST_LINE in text:
            self._last_line_seen.set()

    def wait_for_last(self) -> None:
        """Waits until llama.cpp has logged all about a failed start. It logs in a thread of its own, which may be late."""
        self._last_line_seen.wait(LAST_LINE_TIMEOUT)


@contextmanager
def captured() -> Iterator[Errors]:
    """Copies llama.cpp's log within the context, and yields its last errors.

    Each line keeps its level, except that information becomes debug.
    """
    errors = Errors()
    records: _Records = SimpleQueue()
    # Logging has a thread of its own, because it may write to descriptor 2. That write may block until the pipe is read, so the
    # thread that reads the pipe must not log.
    writer = threading.Thread(target=_write, args=(records,), name="llama.cpp log", daemon=True)
    with closing(Output(2)) as others:
        writer.start()
        try:
            with output.captured(2, lambda line: _sort(line, records, others, errors)):
                yield errors
        finally:
            records.put(None)
            writer.join(timeout=1)


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
