"""Runs `flywheel generate --chat`: keeps a conversation at the terminal."""

import os
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import count
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

from flywheel_client import _terminal as terminal
from flywheel_client._client_sync import Client
from flywheel_client._commands import advice
from flywheel_client._errors import CallCancelledError, FlywheelError
from flywheel_client._generate import Generator, ResultWrapper, generator, print_text
from flywheel_client._prompt import MAX_PROMPT_BYTES
from flywheel_client._request import Message

if TYPE_CHECKING:
    from flywheel_client._options import RequestOptions, Server

EXIT: Final = "/exit"
PROMPT: Final = "> "
HELP: Final = f"Ctrl-C stops an answer. Ctrl-D or {EXIT} ends the conversation."


def chat(server: "Server", prompt: str | None, system: str | None, options: "RequestOptions", *, timeout: float | None) -> None:
    """Reads messages from stdin, one a line, and prints the answers, until the end of stdin or `/exit`.

    Args:
        server: The server that answers.
        prompt: The first message; None or "-" reads it from stdin too.
        system: The system message, if there is one.
        options: The options of each generation.
        timeout: The seconds that each answer may take; None sets no deadline.
    """
    if (options.num_samples or 1) != 1:
        raise ValueError("a conversation has one answer: give --chat or --samples, not both")
    is_terminal = sys.stdin.isatty()
    with generator(server, timeout) as generating:
        conversation = Conversation(generating, options.fields(), system, goes_on=is_terminal)
        if prompt not in {None, "-"}:
            conversation.answer(str(prompt))
        for message in _until_exit(_typed() if is_terminal else _piped()):
            conversation.answer(message)


class Conversation:
    """Answers messages, and keeps them.

    Attributes:
        goes_on: Whether an interrupt stops only the answer, and a call that fails does not end the conversation. The part of
            the answer that came is kept. If nothing came, the message is dropped, because the model has not answered it.
    """

    def __init__(self, generating: Generator, fields: dict[str, Any], system: str | None, *, goes_on: bool) -> None:
        self.goes_on = goes_on
        self._generating = generating
        self._fields = fields
        self._messages = [] if system is None else [Message("system", system)]
        self._output = terminal.Output(sys.stdout)
        self._answer = ""
        self._stream: Any = None
        self._stopped = False
        self._stopped_at_line_start = False

    def answer(self, text: str) -> None:
        """Prints the answer to a message."""
        messages = [*self._messages, Message("user", text)]
        self._answer, self._stopped = "", False
        before = signal.getsignal(signal.SIGINT)
        if self.goes_on and before is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._stop)
        try:
            self._generating.run(self._show, self._fields | {"messages": messages})
        except (FlywheelError, KeyboardInterrupt) as error:
            if not self.goes_on:
                raise
            self._report(error)
        finally:
            self._stream = None
            signal.signal(signal.SIGINT, before)
            self._output.end_line()
        if self._answer:
            self._messages = [*messages, Message("assistant", self._answer)]

    def _report(self, error: FlywheelError | KeyboardInterrupt) -> None:
        """Tells the user why the answer has ended early."""
        self._output.end_line()
        if isinstance(error, FlywheelError) and not (self._stopped and isinstance(error, CallCancelledError)):
            terminal.show_error(terminal.describe(error, advice(error, self._generating.server)))
            return
        if self._stopped_at_line_start:
            sys.stderr.write("\n")  # the terminal has written ^C
        terminal.show_aside(["stopped"])

    def _show(self, watched: ResultWrapper, client: Client, fields: dict[str, Any]) -> None:
        def recorded(stream: Iterable[Any]) -> Iterator[Any]:
            self._stream = stream
            try:
                for delta in watched(stream):
                    self._answer += delta.text
                    yield delta
            except FlywheelError:
                self._stream = None  # the next try has a stream of its own
                raise

        print_text(recorded, client, fields, self._output)

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        """Stops the answer: cancels its stream, so that no write is interrupted; raises only if there is no stream."""
        self._stopped, self._stopped_at_line_start = True, not self._output.line_is_open
        stream, self._stream = self._stream, None
        if stream is None:
            raise KeyboardInterrupt
        stream.cancel()


def _until_exit(lines: Iterable[str]) -> Iterator[str]:
    """Yields the messages among the lines: all lines that are not blank, until a line is `/exit`."""
    for line in lines:
        if line.strip() == EXIT:
            return
        if line.strip():
            yield line


def _typed() -> Iterator[str]:
    """Yields the lines that a user types. An interrupt drops the line."""
    terminal.show_aside([HELP])
    while True:
        try:
            yield _read_typed()
        except KeyboardInterrupt:
            sys.stderr.write("\n")
            terminal.show_aside([HELP])
        except EOFError:
            sys.stderr.write("\n")
            return


def _read_typed() -> str:
    if sys.stdout.isatty():
        with suppress(ImportError):  # Windows has no such module
            import readline

            if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
                # It writes escape sequences.
                readline.parse_and_bind("set enable-bracketed-paste off")
        return input(PROMPT)
    # Not `input`: it would write its prompt to stdout.
    sys.stderr.write(PROMPT)
    sys.stderr.flush()
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n")


def _piped() -> Iterator[str]:
    """Yields the lines of stdin, which are UTF-8."""
    for number in count(1):
        line = sys.stdin.buffer.readline(MAX_PROMPT_BYTES + 1)
        if not line:
            return
        if len(line) > MAX_PROMPT_BYTES:
            raise ValueError(f"line {number} on stdin is longer than {MAX_PROMPT_BYTES // 2**20} MiB")
        try:
            # Some text tools write a byte order mark, and Windows ends lines with CR and LF.
            yield line.decode("utf-8-sig" if number == 1 else "utf-8").removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise ValueError(f"line {number} on stdin is not UTF-8: {error}") from None
