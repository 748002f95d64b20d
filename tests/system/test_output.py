"""Outputs that never wait for a reader: what they write, what they drop, what they capture, and logs on top of them."""

import logging
import os
import pty
import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import structlog
from flywheel_server import logs
from flywheel_server.engines.llama_cpp import native_log
from flywheel_server.system import descriptors
from flywheel_server.system.output import MAX_BYTES, Output, captured

from tests.serving import until
from tests.system.conftest import Pipe
from tests.telemetry.logged import logging_to_output


def test_an_output_to_a_terminal_shows_what_is_invisible() -> None:
    controller, terminal = pty.openpty()
    output = Output(terminal)
    os.close(terminal)
    output.write("a\x1b[2J\u202eb\U000e0041ü\n".encode() + b"\xff")
    assert output.close()
    shown = os.read(controller, 2**16)
    os.close(controller)
    assert shown.decode() == "a␛[2J\ufffdb\ufffdü\r\n\\xff"


def test_an_output_keeps_the_order_and_says_where_something_is_missing(pipe: Pipe) -> None:
    pipe.fill()
    output = Output(pipe.writing)
    output.notice = lambda dropped: b"%d dropped\n" % dropped
    half = b"a" * (MAX_BYTES // 2 - 1) + b"\n"
    output.write(b"first\n")
    # Until the thread has taken the line, and waits for the reader.
    while output._waiting:
        time.sleep(0.001)
    for piece in (half, half, b"lost\n", b"lost\n"):
        output.write(piece)
    read = bytearray()

    def read_until(sign: bytes) -> None:
        while sign not in read:
            read.extend(os.read(pipe.reading, 2**16))

    read_until(b"a")
    while output._waiting and isinstance(output._waiting[0], bytes):
        read.extend(os.read(pipe.reading, 2**16))
    output.write(b"last\n")
    read_until(b"last\n")
    assert bytes(read).lstrip(b".") == b"first\n" + half + half + b"2 dropped\nlast\n"
    assert output.close()


def test_an_output_writes_what_it_has_taken_before_it_ends(pipe: Pipe) -> None:
    output = Output(pipe.writing)
    for _ in range(100):
        output.write(b"line\n")
    assert output.close()
    output.write(b"too late\n")
    assert os.read(pipe.reading, 2**16) == b"line\n" * 100


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="Linux has pipes that keep writes apart")
def test_what_comes_within_a_short_time_is_written_together_but_no_more_than_a_pipe_keeps_whole() -> None:
    reading, writing = os.pipe2(os.O_DIRECT)
    output = Output(writing)
    os.close(writing)
    line = b"x" * 99 + b"\n"
    for _ in range(100):
        output.write(line)
    assert output.close()
    written = []
    while piece := os.read(reading, 2**16):
        written.append(piece)
    os.close(reading)
    assert b"".join(written) == 100 * line
    assert len(written) < 10
    assert {len(piece) % len(line) for piece in written} == {0}


async def test_of_what_is_written_together_only_what_the_system_refuses_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file:
        output = Output(file.fileno())
    output.notice = lambda dropped: b"%d dropped\n" % dropped
    lines = [b"%d" % number * 99 + b"\n" for number in range(4)]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150, before[1]))
    try:
        for line in lines[:3]:
            output.write(line)
        await until(lambda: output.dropped > 0, "it is refused")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    output.write(lines[3])
    assert output.close()
    assert path.read_bytes() == lines[0] + lines[1][:50] + b"\n2 dropped\n" + lines[3]
    assert output.dropped == 2


def test_one_piece_may_be_larger_than_all_that_may_wait_together(pipe: Pipe) -> None:
    output = Output(pipe.writing)
    output.write(b"a" * 2 * MAX_BYTES)
    read = 0
    while read < 2 * MAX_BYTES:
        read += len(os.read(pipe.reading, 2**20))
    assert output.close()


def test_a_descriptor_that_somebody_has_made_non_blocking_is_waited_for(pipe: Pipe) -> None:
    pipe.fill()
    os.set_blocking(pipe.writing, False)
    output = Output(pipe.writing)
    output.write(b"line\n")
    time.sleep(0.1)
    assert not output.close(0)
    read = b""
    while b"line" not in read:
        read = os.read(pipe.reading, 2**16)
    output._thread.join(10)
    assert output.close()


def test_what_is_captured_comes_in_lines_and_the_rest_at_the_end(pipe: Pipe) -> None:
    lines: list[bytes] = []
    with captured(pipe.writing, lines.append):
        os.write(pipe.writing, b"one\ntwo\nthree")
    os.write(pipe.writing, b"past it")
    assert lines == [b"one\n", b"two\n", b"three"]
    assert os.read(pipe.reading, 100) == b"past it"


@contextmanager
def nothing_left_behind() -> Iterator[None]:
    def held() -> tuple[int, int]:
        return descriptors.in_use(), threading.active_count()

    before = held()
    yield
    assert held() == before


@pytest.mark.parametrize("started", range(3))
def test_an_output_that_cannot_start_its_thread_changes_nothing(started: int, monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start
    left = started

    def start_some(thread: threading.Thread) -> None:
        nonlocal left
        if not left:
            raise RuntimeError("can't start new thread")
        left -= 1
        start(thread)

    before = os.fstat(2)
    with nothing_left_behind(), monkeypatch.context() as poor:
        poor.setattr(threading.Thread, "start", start_some)
        with pytest.raises(RuntimeError, match="can't start"), native_log.captured():
            pass
    assert os.fstat(2) == before


@pytest.mark.parametrize("form", ["text", "json"])
def test_no_text_passes_for_a_record_of_its_own(form: Any, pipe: Pipe) -> None:
    forged = "".join(
        f"x{end}2026-11-26T00:00:00Z [info] forged" for end in ("\n", "\r", "\r\n", "\x0b", "\x0c", "\x85", "\u2028")
    )
    output = Output(pipe.writing)
    with logging_to_output(output, form):
        try:
            raise ValueError(forged)
        except ValueError:
            logging.getLogger("lib").exception(forged)
            structlog.stdlib.get_logger("ours").exception("failed", cause=forged, items=[forged])
    lines = os.read(pipe.reading, 2**20).decode().splitlines()
    assert len([line for line in lines if not line.startswith("    ")]) == 2


@pytest.mark.parametrize("form", ["text", "json"])
def test_an_event_that_cannot_be_rendered_raises_nothing(form: Any, pipe: Pipe, capsys: pytest.CaptureFixture[str]) -> None:
    class Unprintable:
        def __repr__(self) -> str:
            raise ValueError("no words")

    output = Output(pipe.writing)
    with logging_to_output(output, form):
        structlog.stdlib.get_logger("ours").info("cannot be rendered", field=Unprintable())
        structlog.stdlib.get_logger("ours").info("next")
    assert b"next" in os.read(pipe.reading, 2**20)
    said = capsys.readouterr().err
    assert "no words" in said
    assert "cannot be rendered" in said


def test_a_log_that_is_configured_again_leaves_nothing_of_the_first_one() -> None:
    with logging_to_output(None, "text"), nothing_left_behind():
        for form in ("json", "text", "json"):
            logs.configure("info", form)
