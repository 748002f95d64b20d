"""Interrupts, and readers that leave: the command `flywheel` ends its call and itself, and says no more than it must."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import RetryInfo

from tests.client.command import FLYWHEEL, WAIT, delta, environment
from tests.thorough import further

if TYPE_CHECKING:
    from tests.client.conftest import FakeService


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_interrupt_cancels_and_exits_with_130(fake: FakeService, arguments: list[str]) -> None:
    fake.hangs = True
    with subprocess.Popen(
        [*FLYWHEEL, "generate", "p", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(fake)
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(3)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=WAIT)
    assert process.returncode == 130
    assert errors == b""
    assert fake.cancelled.wait(WAIT)


def test_a_reader_that_has_seen_enough_ends_the_command_quietly(fake: FakeService) -> None:
    fake.deltas = [delta(0, "x" * 4096 + "\n", 1)] * 1000
    fake.hangs = True
    with subprocess.Popen(
        [*FLYWHEEL, "generate", "p"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(fake)
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(WAIT) == 141
    assert fake.cancelled.wait(WAIT)


@pytest.mark.parametrize("module", ["google", *further(["flywheel_proto._visible", "grpc", "asyncio", "click"])])
def test_an_interrupt_while_it_is_loaded_ends_it_quietly(module: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-X", "importtime", *FLYWHEEL[1:], "stats", "--address", "localhost:1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stderr is not None
        while module not in (line := process.stderr.readline().decode()):
            assert line, "it has ended"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=WAIT)
    assert process.returncode == 130
    assert b"Traceback" not in errors


def test_an_interrupt_ends_it_while_nobody_reads(fake: FakeService) -> None:
    fake.deltas = [delta(0, "x" * 2**20, 1)]
    reading, writing = os.pipe()
    with subprocess.Popen(
        [*FLYWHEEL, "generate", "p"], stdout=writing, stderr=subprocess.PIPE, env=environment(fake)
    ) as process:
        select.select([reading], [], [], WAIT)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=WAIT)
    os.close(reading)
    os.close(writing)
    assert (process.returncode, errors) == (130, b"")


def waits_for_more(pid: int, pipe: int) -> bool:
    """Returns whether a process has read all that is in the pipe, and sleeps."""
    unread = int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)
    return not unread and Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(") ")[2].startswith("S")


@pytest.mark.thorough
def test_pipes_that_do_not_block_lose_nothing(fake: FakeService) -> None:
    fake.deltas = [delta(0, "x" * 2**20, 1, "stop")]
    pipes = os.pipe(), os.pipe()
    for descriptor in (*pipes[0], *pipes[1]):
        os.set_blocking(descriptor, False)
    (stdin, asking), (answered, stdout) = pipes
    with subprocess.Popen([*FLYWHEEL, "generate"], stdin=stdin, stdout=stdout, env=environment(fake)) as process:
        os.close(stdin)
        os.close(stdout)
        os.write(asking, b"a ")
        while not waits_for_more(process.pid, asking):
            time.sleep(0.01)
        os.write(asking, b"prompt")
        os.close(asking)
        os.set_blocking(answered, True)
        with os.fdopen(answered, "rb") as file:
            assert len(file.read()) == 2**20
    assert process.returncode == 0
    assert fake.requests[0].text == "a prompt"


def test_an_interrupt_ends_the_wait_for_another_attempt(fake: FakeService) -> None:
    fake.refuses = True
    fake.fail(grpc.StatusCode.UNAVAILABLE, "stopping", RetryInfo(retry_delay=Duration(seconds=1000)))
    with subprocess.Popen(
        [*FLYWHEEL, "generate", "p"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(fake)
    ) as process:
        assert fake.called.wait(WAIT)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=WAIT) == (b"", b"")
    assert process.returncode == 130
    assert len(fake.requests) == 1
