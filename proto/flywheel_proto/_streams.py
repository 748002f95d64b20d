"""Makes the standard streams of a command fail in a defined way, even if they are closed before or during its run."""

import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, TextIO

from flywheel_proto._interrupts import EXIT_INTERRUPTED
from flywheel_proto._visible import visible

EXIT_FAILURE: Final = 1
EXIT_BROKEN_PIPE: Final = 141
"""The exit code of a program that SIGPIPE ended, as shells report it."""

BOLD: Final = 1
DIM: Final = 2


class StreamError(Exception):
    """Standard input cannot be read, or standard output cannot be written.

    This class is not an `OSError`, because libraries would handle that as their own error.

    Attributes:
        exit_code: The exit code of the command.
    """

    def __init__(self, what: str, error: OSError) -> None:
        super().__init__(f"cannot {what}: {error.strerror}")
        self.exit_code = EXIT_BROKEN_PIPE if error.errno == errno.EPIPE else EXIT_FAILURE


@contextmanager
def standard_streams(program: str) -> Iterator[None]:
    """Replaces the standard streams with streams that fail in a defined way, and ends the program if they fail.

    A stream that was closed before the program started fails when it is used. If standard output cannot be written, the program
    ends with code 1 and a message; if its reader has left, with code 141 and no message. Standard error never fails: it drops
    what it cannot write. An interrupt ends the program with code 130.
    """
    _open_closed_descriptors()
    # Python 3.14 colours the help with escape sequences, which these streams would make visible.
    os.environ["PYTHON_COLORS"] = "0"
    sys.stdin = io.TextIOWrapper(io.BufferedReader(_Input(_raw(sys.stdin, 0))))
    output = _Output(_raw(sys.stdout, 1))
    sys.stdout = _SafeText(output, sys.stdout)
    sys.stderr = _SafeText(_ErrorOutput(_raw(sys.stderr, 2)), sys.stderr)
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
            if output.failure:
                raise output.failure
    except StreamError as error:
        if error.exit_code != EXIT_BROKEN_PIPE:
            sys.stderr.write(f"{program}: {error}\n")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


def write_styled(stream: TextIO, text: str, style: int) -> None:
    """Writes text in a style, `BOLD` or `DIM`, if the stream is a terminal and the user has not asked for plain text.

    Users ask for plain text with a non-empty variable NO_COLOR (no-color.org), or with TERM=dumb.
    """
    plain = not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    stream.write(text if plain else _Styled(f"\x1b[{style}m{visible(text)}\x1b[0m"))


class _Styled(str):
    """Text with escape sequences that this module has added."""

    __slots__ = ()


class _SafeText(io.TextIOWrapper):
    """Writes any text. On a terminal, makes invisible characters visible; escapes characters that the encoding lacks."""

    def __init__(self, raw: io.RawIOBase, like: TextIO | None) -> None:
        encoding = like.encoding if like else "utf-8"
        super().__init__(io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=True)
        self._before = ""

    def write(self, text: str) -> int:
        if not isinstance(text, _Styled) and self.isatty():
            text, self._before = visible(text, self._before), (self._before + text)[-2:]
        return super().write(text)


class _Raw(io.RawIOBase):
    """A raw stream that blocks even if its descriptor is non-blocking."""

    def __init__(self, raw: Any) -> None:  # noqa: ANN401 - a FileIO, or Python's class for the console of Windows
        self._stream = raw

    def fileno(self) -> int:
        return int(self._stream.fileno())

    def isatty(self) -> bool:
        return bool(self._stream.isatty())


class _Input(_Raw):
    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401 - as io.RawIOBase
        try:
            while (count := self._stream.readinto(buffer)) is None:
                select.select([self], [], [])
        except OSError as error:
            raise StreamError("read standard input", error) from None
        return int(count)


class _Output(_Raw):
    """Fails once, or is interrupted once. Later writes are dropped, because they would keep the program from ending."""

    failure: StreamError | None = None
    _discards = False

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:  # noqa: ANN401 - as io.RawIOBase
        if self._discards:
            return len(data)
        try:
            while (count := self._stream.write(data)) is None:
                select.select([], [self], [])
        except OSError as error:
            self._discards = True
            self.failure = StreamError("write to standard output", error)
            raise self.failure from None
        except KeyboardInterrupt:
            self._discards = True
            raise
        return int(count)


class _ErrorOutput(_Output):
    """Never fails: drops what it cannot write."""

    def write(self, data: Any) -> int:  # noqa: ANN401 - as io.RawIOBase
        try:
            return super().write(data)
        except StreamError:
            return len(data)


def _open_closed_descriptors() -> None:
    """Opens each closed standard descriptor in the wrong direction, so that using it still fails.

    Otherwise the next file or connection would get the number of the descriptor, and the program would print into it.
    """
    for descriptor, flags in enumerate((os.O_WRONLY, os.O_RDONLY, os.O_RDONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            # `open` takes the lowest free number, which is this descriptor.
            os.open(os.devnull, flags)


def _raw(stream: TextIO | None, descriptor: int) -> Any:  # noqa: ANN401 - as in _Raw
    """Returns the raw stream of a text stream. The text stream is None if its descriptor was closed when Python started."""
    if stream is None:
        return io.FileIO(descriptor, "r" if descriptor == 0 else "w", closefd=False)
    return getattr(stream.buffer, "raw", stream.buffer)
