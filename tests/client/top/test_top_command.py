"""The command `flywheel top` as a user runs it: in a pipe, for a script, and on a terminal."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import signal
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests.client.command import FLYWHEEL
from tests.client.top.fake_metrics import HOSTILE, fake_metrics
from tests.serving import until
from tests.thorough import further

if TYPE_CHECKING:
    from collections.abc import Iterator

COLOUR = re.compile(rb"\x1b\[(?:[\d:]+;)*(?:3[0-7]|4[0-7]|9\d|10\d|38|48)[;:m]")
"""The beginning of an escape sequence that sets a colour."""

FULL_SCREEN = b"\x1b[?1049h"
END_OF_FULL_SCREEN = b"\x1b[?1049l"


async def top(*arguments: str, **variables: str) -> tuple[int, str, str]:
    """Runs the command in a pipe, and returns its exit code, its output and its errors."""
    process = await asyncio.create_subprocess_exec(
        *FLYWHEEL,
        "top",
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | {"COLUMNS": "80"} | variables,
    )
    output, errors = await process.communicate()
    return process.returncode or 0, output.decode(), errors.decode()


async def test_a_pipe_gets_a_picture_of_one_interval() -> None:
    async with fake_metrics() as fake:
        fake.samples |= {"flywheel_samples_active": 3, "flywheel_max_concurrent": 4}
        fake.samples[f'flywheel_caller_calls_total{{caller="{HOSTILE}"}}'] = 5
        code, output, errors = await top(fake.address, "127.0.0.1:1", "--interval", "0.1")
    assert (code, errors) == (1, "")
    first, *_ = output.split("\n")
    assert first == f"{fake.address}  up  version 1.2  scripted  m"
    assert "slots        3/4 ████████░░  queue -\n" in output
    assert "127.0.0.1:1  no answer: Connection refused\n" in output
    assert max(map(len, output.split("\n"))) <= 80
    assert all(line.isprintable() for line in output.split("\n"))


async def test_json_has_all_figures() -> None:
    async with fake_metrics() as fake:
        fake.samples |= {"flywheel_calls_active": 3, 'flywheel_calls_refused_total{reason="OVERLOADED"}': 7}
        code, output, errors = await top("--json", "--interval", "0.1", FLYWHEEL_METRICS_ADDRESS=fake.address)
    assert (code, errors) == (0, "")
    (server,) = json.loads(output)["servers"]
    assert (server["address"], server["state"], server["problem"]) == (fake.address, "up", "")
    assert server["interval_seconds"] >= 0.1
    assert server["figures"]["active"] == 3
    assert server["figures"]["first_token"] == {"p50": None, "p99": None}
    assert server["figures"]["ended_early"] == [{"what": "refused OVERLOADED", "per_second": 0.0, "calls": 7.0}]


@pytest.mark.parametrize("arguments", [["localhost"], *further([[], ["localhost:1", "--interval", "0"]])])
async def test_wrong_usage_ends_with_2(arguments: list[str]) -> None:
    code, output, errors = await top(*arguments)
    assert (code, output) == (2, "")
    assert errors


class Terminal:
    """A terminal of 80 columns and 24 lines with the command on it."""

    def __init__(self, controller: int, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.written = b""
        self._controller = controller
        asyncio.get_running_loop().add_reader(controller, self._read)

    def press(self, key: bytes) -> None:
        os.write(self._controller, key)

    async def ended(self) -> int:
        await until(lambda: self.process.poll() is not None, "the command ends")
        return self.process.returncode

    def _read(self) -> None:
        try:
            self.written += os.read(self._controller, 2**16)
        except OSError:  # Linux reports the end of a terminal as EIO.
            asyncio.get_running_loop().remove_reader(self._controller)


@contextmanager
def on_terminal(address: str, **variables: str) -> Iterator[Terminal]:
    controller, terminal = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | {
        "TERM": "xterm-256color",
        "COLUMNS": "80",
        "LINES": "24",
    }
    command = [*FLYWHEEL, "top", address, "--interval", "0.1"]
    process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, env=environment | variables)
    os.close(terminal)
    try:
        yield Terminal(controller, process)
    finally:
        process.kill()
        process.wait()
        asyncio.get_running_loop().remove_reader(controller)
        os.close(controller)


ENDINGS = {"q": b"q", "Ctrl-C": b"\x03"}


@pytest.mark.parametrize("key", ["q", *further(["Ctrl-C"])])
async def test_a_terminal_gets_a_dashboard_until_a_key(key: str) -> None:
    async with fake_metrics() as fake:
        fake.samples[f'flywheel_build_info{{version="{HOSTILE}",engine="x",model="m"}}'] = 1
        with on_terminal(fake.address) as terminal:
            await until(lambda: b"scripted" in terminal.written, "the server is shown")
            terminal.press(ENDINGS[key])
            assert await terminal.ended() == 0
    assert FULL_SCREEN in terminal.written
    assert END_OF_FULL_SCREEN in terminal.written
    assert b"\x1b]0;y" not in terminal.written
    assert "\x9b" not in terminal.written.decode(errors="replace")
    assert COLOUR.search(terminal.written)


@pytest.mark.thorough
async def test_sigterm_gives_the_terminal_back_and_no_color_is_obeyed() -> None:
    async with fake_metrics() as fake:
        with on_terminal(fake.address, NO_COLOR="1") as terminal:
            await until(lambda: b"scripted" in terminal.written, "the server is shown")
            terminal.process.send_signal(signal.SIGTERM)
            assert await terminal.ended() == 128 + signal.SIGTERM
    assert END_OF_FULL_SCREEN in terminal.written
    assert not COLOUR.search(terminal.written)


@pytest.mark.thorough
async def test_a_terminal_that_cannot_move_its_cursor_gets_lines() -> None:
    async with fake_metrics() as fake:
        with on_terminal(fake.address, TERM="dumb") as terminal:
            assert await terminal.ended() == 0
            await until(lambda: b"process" in terminal.written, "the server is shown")
    assert b"\x1b" not in terminal.written
