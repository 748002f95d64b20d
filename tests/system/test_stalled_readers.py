"""The reader of standard output and standard error may stall or be gone: the server does not wait for it."""

import asyncio
import json
import os
import pty
import re
import resource
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import grpc
import grpc.aio
import psutil
import pytest
from flywheel_proto.v1 import generation_pb2 as pb

from tests.server.test_command import SCRIPTED, command, ready_line
from tests.serving import Target, code_of, connected, free_ports, until
from tests.system.conftest import Pipe

EMBEDDED = ["--address", "127.0.0.1:0", "--embedded-threads", "1"]
LONG = "llama " * 3_333
DROPPED = re.compile(rb"(\d+) log lines dropped")


async def answered(target: Target) -> None:
    """Returns when the server has generated something."""
    request = pb.GenerationRequest(text="x", max_tokens=1)

    async def ok() -> bool:
        return await code_of(target.stub.GenerateAll(request, wait_for_ready=True, timeout=30)) is grpc.StatusCode.OK

    await until(ok, "it answers")


# Servers whose log has long lines (prompts), or many lines (of llama.cpp), and a request that causes them.
PROMPTS = ([*SCRIPTED, "--log-prompts", "true"], pb.GenerationRequest(text=LONG, max_tokens=1))


NATIVE = ([*EMBEDDED, "--log-level", "debug"], pb.GenerationRequest(text="x", max_tokens=1, num_samples=8))


@pytest.mark.parametrize(
    ("engine", "request_", "form"),
    [
        pytest.param(*PROMPTS, "text", id="text", marks=pytest.mark.thorough),
        pytest.param(*PROMPTS, "json", id="json"),
        pytest.param(*NATIVE, "text", id="embedded", marks=pytest.mark.thorough),
    ],
)
async def test_a_reader_of_the_log_that_stalls_stops_nobody(
    engine: list[str], request_: pb.GenerationRequest, form: str, pipe: Pipe
) -> None:
    async with command(*engine, "--log-format", form, stderr=pipe.writing) as process:
        _, address = await ready_line(process)
        async with connected(address) as target:
            for _ in range(10):
                calls = (target.stub.GenerateAll(pb.GenerationRequest(), timeout=30) for _ in range(50))
                assert {await code_of(call) for call in calls} == {grpc.StatusCode.INVALID_ARGUMENT}
            for _ in range(80):
                await target.stub.GenerateAll(request_, timeout=30)
            read = await pipe.read_until(DROPPED)
            line = next(line for line in read.splitlines() if DROPPED.search(line))
            if form == "json":
                assert json.loads(line)["level"] == "warning"
            assert read.count(b"call refused") == 500, "what fits is written, however late"
            pipe.fill()
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(10):
            assert await process.wait() == 0


@pytest.mark.parametrize(
    ("arguments", "end", "code"),
    [
        (["--nonsense"], None, 2),
        pytest.param(["--embedded-slots", "0"], None, 2, marks=pytest.mark.thorough),
        pytest.param(["--model", "/nowhere.gguf"], None, 1, marks=pytest.mark.thorough),
        pytest.param(EMBEDDED, signal.SIGTERM, 0, marks=pytest.mark.thorough),
        (["--engine", "scripted"], signal.SIGINT, 0),
        (["--engine", "scripted", "--script", '{"die_after": 0}', "--engine-death", "exit"], None, 1),
        (["--engine", "scripted"], signal.SIGSEGV, -signal.SIGSEGV),
        pytest.param(EMBEDDED, signal.SIGABRT, -signal.SIGABRT, marks=pytest.mark.thorough),
    ],
    ids=str,
)
async def test_a_server_ends_even_if_nobody_reads_its_output(
    arguments: list[str], end: signal.Signals | None, code: int, pipe: Pipe
) -> None:
    pipe.fill()
    address = f"127.0.0.1:{free_ports(1)[0]}"
    async with (
        command(*arguments, "--address", address, stdout=pipe.writing, stderr=pipe.writing) as process,
        connected(address) as target,
    ):
        if code != 2 and "--model" not in arguments:
            request = pb.GenerationRequest(text="x", max_tokens=1)
            if end:
                await answered(target)
                process.send_signal(end)
            else:
                await code_of(target.stub.GenerateAll(request, wait_for_ready=True, timeout=30))
        async with asyncio.timeout(20):
            assert await process.wait() == code


@pytest.mark.parametrize(
    ("redirection", "engine"),
    [
        *((redirection, SCRIPTED[:2]) for redirection in ("2>&-", ">/dev/full 2>&1")),
        *(
            pytest.param(redirection, engine, marks=pytest.mark.thorough)
            for redirection, engine in (
                *((redirection, SCRIPTED[:2]) for redirection in (">&-", "2>/dev/full", "| true", "2>&1 | true")),
                (">&- 2>&- <&-", EMBEDDED[2:]),
                ("2>&1 | true", EMBEDDED[2:]),
            )
        ),
    ],
    ids=str,
)
async def test_output_that_goes_nowhere_stops_nobody(redirection: str, engine: list[str], tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_ports(1)[0]}"
    script = f'("$@" & echo $! >pid; wait $!; echo $? >code) {redirection}'
    arguments = [sys.executable, "-m", "flywheel_server", "--address", address, "--withdraw-window", "0", *engine]
    process = await asyncio.create_subprocess_exec("bash", "-c", script, "bash", *arguments, cwd=tmp_path)
    async with connected(address) as target:
        await answered(target)
        for _ in range(50):
            call = target.stub.GenerateAll(pb.GenerationRequest(), timeout=30)
            assert await code_of(call) is grpc.StatusCode.INVALID_ARGUMENT
    pid = int((tmp_path / "pid").read_text())
    used = _cpu_seconds(pid)
    await asyncio.sleep(0.3)
    assert _cpu_seconds(pid) - used < 0.25, "it spins"
    os.kill(pid, signal.SIGTERM)
    async with asyncio.timeout(20):
        await process.wait()
    assert (tmp_path / "code").read_text() == "0\n"


def _cpu_seconds(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


async def test_a_disk_that_is_full_for_a_while_costs_the_lines_of_that_time(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as file:
        async with command(*SCRIPTED, stderr=file) as process:
            _, address = await ready_line(process)
            async with connected(address) as target:
                await code_of(target.stub.GenerateAll(pb.GenerationRequest()))
                await until(lambda: log.stat().st_size > 0, "it is written")
                # In the middle of the next line.
                full = log.stat().st_size + 7
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (full, resource.RLIM_INFINITY))
                for _ in range(5):
                    await code_of(target.stub.GenerateAll(pb.GenerationRequest()))
                await until(lambda: log.stat().st_size == full, "the disk is full")
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
                await code_of(target.stub.GenerateAll(pb.GenerationRequest()))
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0
    first, torn, *rest = log.read_text().splitlines()
    assert "call refused" in first
    assert len(torn) == 7
    (dropped,) = (int(found[1]) for line in rest if (found := re.search(r"(\d+) log lines dropped", line)))
    assert dropped >= 1
    assert dropped + sum("call refused" in line for line in rest) == 5 + 1
    assert any("stopping" in line for line in rest)


async def test_further_signals_do_not_take_the_last_lines_from_a_reader_that_is_late(pipe: Pipe) -> None:
    lines = 600  # which a pipe has no room for
    async with command(*SCRIPTED, stderr=pipe.writing) as process:
        _, address = await ready_line(process)
        async with connected(address) as target:
            for _ in range(lines):
                assert await code_of(target.stub.GenerateAll(pb.GenerationRequest())) is grpc.StatusCode.INVALID_ARGUMENT
        process.send_signal(signal.SIGTERM)
        await until(lambda: not _listens(address), "the server stops")
        for _ in range(20):
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.01)
        log = await pipe.read_until(re.compile(rb"stopping.*\n(.*\n)*\Z"))
        assert await process.wait() == 0
    assert log.count(b"call refused") == lines


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port))).close()
    except ConnectionError:
        return False
    return True


@pytest.mark.thorough
async def test_a_terminal_gets_nothing_invisible_of_what_callers_send() -> None:
    controller, terminal = pty.openpty()
    with os.fdopen(terminal, "wb") as file:
        server = command(*SCRIPTED, "--log-prompts", "true", stderr=file, environment={"NO_COLOR": ""})
        async with server as process:
            _, address = await ready_line(process)
            async with connected(address) as target:
                await target.stub.GenerateAll(pb.GenerationRequest(text="a\x1b[2J\u202eb\U000e0041c", max_tokens=1))
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0
    os.set_blocking(controller, False)
    log = os.read(controller, 2**16).decode()
    os.close(controller)
    assert "a␛[2J\ufffdb\ufffdc" in log
    assert [character for character in log if not character.isprintable() and character not in "\r\n"] == []


IN_A_CONTAINER = """
import logging, os, sys, time
from flywheel_server import logs
from flywheel_server.system import descriptors
from flywheel_server.engines.llama_cpp import native_log
logs.configure("info", "text")
began = time.monotonic()
with native_log.captured():
    for _ in range(3000):
        logging.getLogger("ours").info("x" * 1000)
        os.write(2, b"0.00.001.000 E srv llama.cpp's\\n" + b"somebody else's\\n" * 10)
os.write(1, b"%d" % (time.monotonic() - began))
"""


def test_nobody_waits_for_the_reader_in_a_process_that_is_not_ours(pipe: Pipe) -> None:
    pipe.fill()
    out = subprocess.run(
        [sys.executable, "-c", IN_A_CONTAINER], stdout=subprocess.PIPE, stderr=pipe.writing, check=True, timeout=30
    ).stdout
    assert int(out) < 10
