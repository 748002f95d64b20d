"""llama.cpp's log in ours. It writes to file descriptor 2 and offers no callback, so its lines are read back from there.

What is not a line of llama.cpp's passes through unchanged.
"""

import logging
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from typing import Final

log = logging.getLogger("llama.cpp")

# For example `0.00.403.400 W srv          stop: cancel task, id_task = 3`.
_LINE: Final = re.compile(rb"(?:\x1b\[\d*m)*[\d.]+ (?:\x1b\[\d*m)*(?P<level>[DIWE]) (?P<text>.*)")
_LEVELS: Final = {b"E": logging.ERROR, b"W": logging.WARNING, b"I": logging.DEBUG, b"D": logging.DEBUG}
_COLOR: Final = re.compile(r"\x1b\[\d*m")

# What llama.cpp warns of although it happens every day: a completion is cancelled, a prompt is in its cache.
_ORDINARY: Final = re.compile("stop: cancel task|need to evaluate at least 1 token|n_past was set to")

_Records = SimpleQueue[tuple[int, str] | None]


def verbosity() -> int:
    """Returns how much llama.cpp must log for what our log shows: warnings, or everything."""
    return 4 if log.isEnabledFor(logging.DEBUG) else 2


@contextmanager
def captured() -> Iterator[None]:
    """Logs what llama.cpp writes, for the length of the context, at the level it has there; its information is our debug."""
    reading, writing = os.pipe()
    stderr = os.dup(2)
    os.dup2(writing, 2)
    os.close(writing)
    records: _Records = SimpleQueue()
    # Two threads, because whoever logs may write to descriptor 2 itself: the one that empties the pipe must not wait for that.
    reader = threading.Thread(target=_read, args=(reading, stderr, records), name="llama.cpp log reader", daemon=True)
    writer = threading.Thread(target=_write, args=(records,), name="llama.cpp log writer", daemon=True)
    reader.start()
    writer.start()
    try:
        yield
    finally:
        # This closes our writing end of the pipe, which ends the reader, which ends the writer. A child process that has
        # inherited it may hold it open longer: its lines go nowhere then.
        os.dup2(stderr, 2)
        reader.join(timeout=1)
        writer.join(timeout=1)
        if not reader.is_alive():
            os.close(stderr)


def _read(reading: int, stderr: int, records: _Records) -> None:
    with os.fdopen(reading, "rb") as lines:
        for line in lines:
            if match := _LINE.match(line):
                text = _COLOR.sub("", match["text"].decode(errors="replace")).rstrip()
                records.put((logging.DEBUG if _ORDINARY.search(text) else _LEVELS[match["level"]], text))
            else:
                # Whoever read standard error may be gone; the pipe must be emptied all the same.
                with suppress(OSError):
                    os.write(stderr, line)
    records.put(None)


def _write(records: _Records) -> None:
    while record := records.get():
        log.log(record[0], "%s", record[1])
