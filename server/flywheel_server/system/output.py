"""Writes output without blocking the server: its reader may stall or go away."""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from flywheel_proto._visible import visible

MAX_BYTES: Final = 2**20
"""Bytes of output that wait for the reader at most."""

CLOSE_TIMEOUT: Final = 1.0
"""Seconds that the reader has at the end to take the output that still waits."""

MAX_WRITE_BYTES: Final = 4096
"""Bytes of several pieces that are written together at most: so much, a pipe takes without mixing it with what others write."""

WRITE_INTERVAL: Final = 0.1
"""Seconds after all output has been written in which further output is collected, to be written together."""

RETRY_INTERVAL: Final = 0.05
"""Seconds between two attempts to write to a non-blocking descriptor that is full."""

MAX_LINE_BYTES: Final = 2**16
"""Bytes after which a line of captured output is passed on unfinished."""


class Output:
    """Writes to a file descriptor on a thread of its own. If that is a terminal, makes invisible characters visible.

    Output that exceeds `MAX_BYTES` is dropped and counted. So is output that the system refuses to write, for example because a
    disk is full or the reader is gone.

    Arguments:
        descriptor: The descriptor. It is duplicated, so it may be closed or replaced afterwards.

    Attributes:
        is_terminal: Whether the descriptor is a terminal.
        notice: Returns the text to write in place of this many dropped pieces.
        dropped: How many pieces have been dropped so far.
    """

    def __init__(self, descriptor: int) -> None:
        self.notice: Callable[[int], bytes] = lambda _: b""
        self.dropped = 0
        self._descriptor = os.dup(descriptor)
        self.is_terminal = os.isatty(descriptor)
        # A number stands for so many pieces that were dropped at this point.
        self._waiting: deque[bytes | int] = deque()
        self._waiting_bytes = 0
        self._closed = False
        self._gives_up_at = 0.0
        self._closing = threading.Event()
        """Ends the pause between two writes."""
        self._line_is_cut = False
        """Whether the last write was incomplete, so that the line on the descriptor is."""
        # Reentrant: a garbage collection in `write` may run a finalizer that logs.
        self._changed = threading.Condition(threading.RLock())
        self._thread = start_owner(self._descriptor, self._run, f"output {descriptor}")

    def write(self, data: bytes) -> None:
        """Queues data to be written, or counts it as dropped. Never waits."""
        if self.is_terminal:
            data = visible(data.decode(errors="backslashreplace")).encode()
        with self._changed:
            if self._closed:
                return
            if self._waiting_bytes and self._waiting_bytes + len(data) > MAX_BYTES:
                self.dropped += 1
                if isinstance(last := self._waiting[-1], int):
                    self._waiting[-1] = last + 1
                else:
                    self._waiting.append(1)
            else:
                self._waiting.append(data)
                self._waiting_bytes += len(data)
            self._changed.notify()

    def close(self, timeout: float = CLOSE_TIMEOUT) -> bool:
        """Ignores further output, and waits for up to `timeout` seconds. Returns whether all queued output was written.

        Any thread may call this. Further calls wait no longer than the first one.
        """
        with self._changed:
            if not self._closed:
                self._gives_up_at = time.monotonic() + timeout
            self._closed = True
            self._changed.notify()
        self._closing.set()
        self._thread.join(max(self._gives_up_at - time.monotonic(), 0))
        return not self._thread.is_alive()

    def _run(self) -> None:
        unsaid = 0
        while (pieces := self._next()) is not None:
            if isinstance(pieces, int):
                unsaid += pieces
                pieces = []
            if unsaid and not self._write([self.notice(unsaid)]):
                unsaid = 0
            if lost := self._write(pieces):
                with self._changed:
                    self.dropped += lost
                unsaid += lost
        os.close(self._descriptor)

    def _next(self) -> list[bytes] | int | None:
        """Waits for output. Returns pieces to be written together, or how many were dropped; None at the end."""
        if not self._waiting:
            # Otherwise each line would wake this thread, which costs more than the line.
            self._closing.wait(WRITE_INTERVAL)
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if not self._waiting:
                return None
            first = self._waiting.popleft()
            if isinstance(first, int):
                return first
            pieces, size = [first], len(first)
            while self._waiting and isinstance(piece := self._waiting[0], bytes) and size + len(piece) <= MAX_WRITE_BYTES:
                self._waiting.popleft()
                pieces.append(piece)
                size += len(piece)
            self._waiting_bytes -= size
            return pieces

    def _write(self, pieces: list[bytes]) -> int:
        """Writes the pieces together. Returns how many of them, from the last on, the system refused in whole or in part."""
        data = b"".join(pieces)
        rest = memoryview(b"\n" + data if self._line_is_cut and data else data)
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
                self._line_is_cut = bool(rest)
            except BlockingIOError:
                # Another process that shares the descriptor has made it non-blocking.
                time.sleep(RETRY_INTERVAL)
            except OSError:
                break
        unwritten, refused = len(rest), 0
        while unwritten > 0 and refused < len(pieces):
            refused += 1
            unwritten -= len(pieces[-refused])
        return refused


def start_owner(descriptor: int, run: Callable[[], None], name: str) -> threading.Thread:
    """Starts a thread that owns the descriptor: `run` closes it at its end.

    The thread is a daemon, because reading and writing a pipe may block forever.

    Raises:
        RuntimeError: No thread can be started. The descriptor is closed.
    """
    thread = threading.Thread(target=run, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError:
        os.close(descriptor)
        raise
    return thread


@contextmanager
def captured(descriptor: int, on_line: Callable[[bytes], None]) -> Iterator[None]:
    """Passes each line that is written to the descriptor to `on_line` instead, for the length of the context.

    `on_line` runs on a thread of its own. It must not block, because writers would block too.
    """
    before = os.dup(descriptor)
    try:
        reading, writing = os.pipe()
        try:
            reader = start_owner(reading, lambda: _read(reading, on_line), f"capture {descriptor}")
            os.dup2(writing, descriptor)
        finally:
            os.close(writing)
        try:
            yield
        finally:
            # This closes our writing end of the pipe, which ends the reader, unless a child process has inherited it.
            os.dup2(before, descriptor)
            reader.join(CLOSE_TIMEOUT)
    finally:
        os.close(before)


def forward(reading: int, on_lines: Callable[[bytes], None]) -> None:
    """Passes whole lines that another process writes to a pipe to `on_lines`, and returns when that process has ended.

    Lines that the process wrote at once, such as a log record of several lines, are passed together. To be run on a thread.
    """
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        rest = b""
        while data := pipe.read(MAX_LINE_BYTES):
            lines, newline, rest = (rest + data).rpartition(b"\n")
            if newline or len(rest) >= MAX_LINE_BYTES:
                on_lines(lines + newline or rest)
                rest = rest if newline else b""
        if rest:
            on_lines(rest + b"\n")


def _read(reading: int, on_line: Callable[[bytes], None]) -> None:
    with os.fdopen(reading, "rb") as lines:
        while line := lines.readline(MAX_LINE_BYTES):
            on_line(line)
