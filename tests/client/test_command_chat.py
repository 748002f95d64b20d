"""`flywheel generate --chat`: a conversation at the terminal, or from a pipe."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Self

import grpc
import psutil
import pytest
from google.rpc.error_details_pb2 import ErrorInfo

from tests.client.command import FLYWHEEL, WAIT, delta, environment, flywheel
from tests.thorough import further

if TYPE_CHECKING:
    from types import TracebackType

    from tests.client.conftest import FakeService

ON_TERMINAL = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.executable, sys.argv[1:])"
"""A program that runs a command on its standard input as its controlling terminal, which turns Ctrl-C into an interrupt."""

HELP = "Ctrl-C stops an answer. Ctrl-D or /exit ends the conversation.\n"


class Typist:
    """Types at a terminal on which the command runs."""

    def __init__(self, fake: FakeService, *arguments: str, **variables: str) -> None:
        self._controller, terminal = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", ON_TERMINAL, *FLYWHEEL, "generate", "--chat", *arguments],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            env=environment(fake) | {"TERM": "xterm", "NO_COLOR": "1"} | variables,
            start_new_session=True,
        )
        os.close(terminal)
        self.written = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._controller)

    def type(self, keys: str) -> None:
        os.write(self._controller, keys.encode())

    def interrupt(self) -> None:
        """Types Ctrl-C when the command waits. Python forgets an interrupt just before `input` waits, until the next key."""
        started = time.monotonic()
        while psutil.Process(self.process.pid).status() != psutil.STATUS_SLEEPING:
            assert time.monotonic() < started + WAIT
            time.sleep(0.001)
        self.type("\x03")

    def read(self, end: str) -> str:
        """Reads until the text that was not read yet ends so, or the command has ended; returns the text."""
        started = time.monotonic()
        while not self.written.endswith(end):
            assert time.monotonic() < started + WAIT, self.written
            try:
                self.written += os.read(self._controller, 4096).decode().replace("\r\n", "\n")
            except OSError:  # Linux reports the end of a terminal as EIO.
                break
        read, self.written = self.written, ""
        return read

    def leave(self, keys: str) -> str:
        """Ends the conversation with these keys; returns what the command writes."""
        self.type(keys)
        read = self.read("never")
        assert self.process.wait(WAIT) == 0
        return read


def conversation(fake: FakeService) -> list[tuple[str, str]]:
    """Returns the messages of the last request."""
    return [(message.role, message.content) for message in fake.requests[-1].messages]


@pytest.mark.parametrize("end", ["\x04", *further(["/exit\n"])])
def test_a_conversation_has_a_history(fake: FakeService, end: str) -> None:
    fake.deltas = [delta(0, "Salut", 1), delta(0, ".", 2, "stop")]
    with Typist(fake, "--system", "In French.") as typist:
        assert typist.read("> ") == f"{HELP}> "
        typist.type("Hello\n")
        shown = typist.read("\n> ")
        assert re.fullmatch(r"Hello\nSalut\.\n2 tokens \(prompt 5\), stop, [^\n]*\n> ", shown), shown
        assert conversation(fake) == [("system", "In French."), ("user", "Hello")]
        typist.type("\n")
        assert typist.read("> ") == "\n> "
        typist.type("How are you?\n")
        typist.read("\n> ")
        assert conversation(fake)[1:] == [("user", "Hello"), ("assistant", "Salut."), ("user", "How are you?")]
        assert "Traceback" not in typist.leave(end)


def test_ctrl_c_stops_the_answer_only_and_keeps_the_part_that_came(fake: FakeService) -> None:
    fake.deltas = [delta(0, "Once", 1)]
    fake.hangs = True
    with Typist(fake, "Tell me") as typist:
        assert typist.read("Once") == "Once"
        typist.interrupt()
        assert typist.read("> ") == f"^C\nstopped\n{HELP}> "
        assert fake.cancelled.wait(WAIT)
        typist.type("half a line")
        assert typist.read("half a line") == "half a line"
        typist.interrupt()
        assert typist.read(f"{HELP}> ").endswith(f"\n{HELP}> ")
        fake.hangs = False
        typist.type("Go on\n")
        typist.read("\n> ")
        assert conversation(fake) == [("user", "Tell me"), ("assistant", "Once"), ("user", "Go on")]
        typist.leave("\x04")


def test_an_answer_without_a_text_is_not_in_the_history(fake: FakeService) -> None:
    fake.holds = True
    with Typist(fake) as typist:
        typist.read("> ")
        typist.type("First\n")
        assert fake.called.wait(WAIT)
        typist.interrupt()
        assert typist.read("\n> ") == "First\n^C\nstopped\n> "
        fake.holds = False
        fake.deltas = []
        fake.fail(grpc.StatusCode.INTERNAL, "the engine failed", ErrorInfo(reason="ENGINE_FAILED", domain="flywheel.v1"))
        typist.type("Second\n")
        assert "\nflywheel: INTERNAL: the engine failed\n" in typist.read("\n> ")
        fake.failure = None
        typist.type("Third\n")
        typist.read("\n> ")
        assert conversation(fake) == [("user", "Third")]
        typist.leave("\x04")


def test_messages_may_be_piped_in(fake: FakeService) -> None:
    process = flywheel(fake, "generate", "--chat", "One", stdin="\ufeffZwölf\r\n\n/exit\nnever".encode())
    assert (process.returncode, process.stdout) == (0, b"abc\nabc\n")
    assert conversation(fake) == [("user", "One"), ("assistant", "abc"), ("user", "Zwölf")]
    assert process.stderr.count(b"\n") == 2


@pytest.mark.parametrize("stdin", [b"a\n\xff\n", *further([b"a\n" + b"x" * (2**26 + 1)])])
def test_a_line_that_is_no_message_ends_the_conversation(fake: FakeService, stdin: bytes) -> None:
    process = flywheel(fake, "generate", "--chat", stdin=stdin)
    assert (process.returncode, process.stdout) == (2, b"abc\n")
    assert b"flywheel: line 2 on stdin is " in process.stderr


def test_an_error_ends_a_conversation_from_a_pipe(fake: FakeService) -> None:
    fake.fail(grpc.StatusCode.INTERNAL, "the engine failed", ErrorInfo(reason="ENGINE_FAILED", domain="flywheel.v1"))
    process = flywheel(fake, "generate", "--chat", stdin=b"a\nb\n")
    assert (process.returncode, process.stdout, fake.requests) == (1, b"", [])
    assert process.stderr.startswith(b"flywheel: INTERNAL: the engine failed\n")


def test_an_interrupt_ends_a_conversation_from_a_pipe(fake: FakeService) -> None:
    fake.hangs = True
    with subprocess.Popen(
        [*FLYWHEEL, "generate", "--chat", "a"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(fake)
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(3)
        process.send_signal(2)
        process.communicate(timeout=WAIT)
    assert process.returncode == 130
    assert fake.cancelled.wait(WAIT)
