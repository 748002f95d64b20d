"""Runs the command `flywheel` as a user does: as a process of its own, in a pipe or on a terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from typing import TYPE_CHECKING

from flywheel_proto.v1.generation_pb2 import GenerationDelta

if TYPE_CHECKING:
    from tests.client.conftest import FakeService


WAIT = 20.0

FLYWHEEL = [sys.executable, "-m", "flywheel_client"]

HIDDEN = "a\u202eb\U000e0041"
"""Text with characters that change its order on a terminal, or are not shown at all."""


def delta(index: int, text: str, tokens: int, finish_reason: str = "") -> GenerationDelta:
    return GenerationDelta(index=index, text=text, generated_tokens=tokens, finish_reason=finish_reason, prompt_tokens=5)


def flywheel(fake: FakeService, *arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*FLYWHEEL, *arguments], input=stdin, capture_output=True, env=environment(fake), timeout=WAIT, check=False
    )


def environment(fake: FakeService) -> dict[str, str]:
    return os.environ | {"FLYWHEEL_ADDRESS": fake.address, "COLUMNS": "80"}


def on_terminal(fake: FakeService, *arguments: str, **variables: str) -> bytes:
    """Returns what the command writes to a terminal that is both its stdout and its stderr, and can show colours."""
    controller, terminal = pty.openpty()
    environ = environment(fake) | {"TERM": "xterm", "NO_COLOR": ""} | variables
    with subprocess.Popen([*FLYWHEEL, *arguments], stdin=subprocess.DEVNULL, stdout=terminal, stderr=terminal, env=environ):
        os.close(terminal)
        written = b""
        try:
            while chunk := os.read(controller, 4096):
                written += chunk
        except OSError:  # Linux reports the end of a terminal as EIO.
            pass
        finally:
            os.close(controller)
    return written.replace(b"\r\n", b"\n")
