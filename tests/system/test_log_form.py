"""The form of the log by default: text on a terminal, and JSON elsewhere, from one process and from several."""

import asyncio
import json
import os
import pty
import signal
import sys
from asyncio.subprocess import PIPE
from typing import IO

import pytest
from flywheel_proto.v1 import generation_pb2 as pb

from tests.server.test_command import SCRIPTED, command, ready_line
from tests.serving import code_of, connected
from tests.thorough import further

SEVERAL = ("--workers", "2")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux spreads connections over workers")


async def logged(stderr: int | IO[bytes], *arguments: str) -> bytes:
    """Runs a server that refuses a call. Returns what it wrote to standard error, if that is a pipe."""
    async with command(*SCRIPTED, *arguments, stderr=stderr, environment={"FLYWHEEL_LOG_FORMAT": ""}) as process:
        _, address = await ready_line(process)
        async with connected(address) as target:
            await code_of(target.stub.GenerateAll(pb.GenerationRequest()))
        process.send_signal(signal.SIGTERM)
        _, err = await asyncio.wait_for(process.communicate(), 30)
    return err or b""


@pytest.mark.parametrize("arguments", [(), *further([SEVERAL])])
async def test_a_pipe_gets_lines_of_json(arguments: tuple[str, ...]) -> None:
    lines = [json.loads(line) for line in (await logged(PIPE, *arguments)).splitlines()]
    assert {"call refused", "stopping"} <= {line["event"] for line in lines}


@pytest.mark.parametrize("arguments", [SEVERAL, *further([()])])
async def test_a_terminal_gets_text(arguments: tuple[str, ...]) -> None:
    log = await logged_on_terminal(*arguments)
    assert "[info] call refused [flywheel_server.interceptors.errors] code=INVALID_ARGUMENT" in log
    assert not [line for line in log.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("arguments", further([("--log-format", "json"), ("--log-format", "json", *SEVERAL)]))
async def test_a_terminal_gets_json_if_the_setting_says_so(arguments: tuple[str, ...]) -> None:
    log = await logged_on_terminal(*arguments)
    assert "call refused" in {json.loads(line)["event"] for line in log.splitlines()}


async def logged_on_terminal(*arguments: str) -> str:
    controller, terminal = pty.openpty()
    with os.fdopen(controller, "rb", buffering=0) as reading:
        with os.fdopen(terminal, "wb") as writing:
            await logged(writing, *arguments)
        os.set_blocking(reading.fileno(), False)
        return (reading.read(2**16) or b"").decode()
