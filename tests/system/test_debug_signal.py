"""The signal that switches the log to debug and back, at every moment of a server's life, and in each of its processes."""

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.system.signals import SWITCH_DEBUG

from tests.server.test_command import SCRIPTED, command, ready_line
from tests.serving import code_of, connected, until
from tests.system.test_signals import ended, has
from tests.thorough import further
from tests.workers.several import Several, several

QUIET = ("--log-level", "error", "--log-format", "json")
EVENT = "log level switched"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


class Log:
    """Our own lines in the log of a process, read while the process runs."""

    def __init__(self, process: Process) -> None:
        self.lines: list[dict[str, Any]] = []
        self._process = process
        self.reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self._process.stderr is not None
        async for line in self._process.stderr:
            if (parsed := json.loads(line))["logger"].startswith("flywheel_server."):
                self.lines.append(parsed)

    def has_switched(self, switches: Sequence[str]) -> bool:
        """Returns whether it has been switched to these levels."""
        return [line["to"] for line in self.lines if line["event"] == EVENT] == switches


async def refuse(address: str) -> None:
    """Makes a call that the log tells of at the level info, and returns when it has."""
    async with connected(address) as target:
        assert await code_of(target.stub.GenerateAll(pb.GenerationRequest())) is grpc.StatusCode.INVALID_ARGUMENT
        # The server logs a call after its status is sent, but before it answers a later one.
        await target.stub.GetStats(pb.GetStatsRequest())


async def test_it_switches_to_debug_and_back() -> None:
    async with command(*SCRIPTED, *QUIET) as process:
        _, address = await ready_line(process)
        log = Log(process)
        switches: list[str] = []
        for to in ("debug", "error", "debug", "error"):
            process.send_signal(SWITCH_DEBUG)
            switches.append(to)
            await until(partial(log.has_switched, switches), "it has switched")
            await refuse(address)
            if to == "debug":
                await until(lambda: log.lines[-1]["event"] == "call refused", "the call is logged")
        process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(log.reading, 30)
        assert await process.wait() == 0
    assert [line["event"] for line in log.lines] == [EVENT, "call refused", EVENT] * 2


async def test_a_signal_of_the_start_is_heeded_once_there_is_a_log() -> None:
    async with command(*SCRIPTED, *QUIET) as process:
        await has(process.pid, "SigBlk", SWITCH_DEBUG)
        process.send_signal(SWITCH_DEBUG)
        _, address = await ready_line(process)
        await refuse(address)
        process.send_signal(signal.SIGTERM)
        said = [json.loads(line)["event"] for line in (await ended(process)).splitlines()]
    assert said[0] == EVENT
    assert {"call refused", "stopping"} <= set(said)


@pytest.mark.parametrize("arguments", [("--workers", "2"), *further([()])])
async def test_a_flood_of_it_from_the_start_to_the_end_kills_nobody(arguments: tuple[str, ...]) -> None:
    async with command(*SCRIPTED, *QUIET, *arguments) as process:
        await has(process.pid, "SigBlk", SWITCH_DEBUG)

        async def flood() -> None:
            # Not `send_signal`, which may take the exit code away from asyncio.
            with suppress(ProcessLookupError):
                while True:
                    for pid in (process.pid, *children(process.pid)):
                        os.kill(pid, SWITCH_DEBUG)
                    await asyncio.sleep(0.003)

        flooding = asyncio.create_task(flood())
        _, address = await ready_line(process)
        await refuse(address)
        process.send_signal(signal.SIGTERM)
        await ended(process)
        await flooding


def children(pid: int) -> list[int]:
    """Returns the processes that the process has started, from their first moment on."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


async def test_all_workers_switch_and_so_does_one_that_starts_later() -> None:
    async with several() as server:
        await switched(server, "debug", {None, 1, 2})
        os.kill(server.pids()[1], signal.SIGKILL)
        await until(lambda: len(of_worker(server, 1)) == 2, "the replacement knows")
        await switched(server, "info", {None, 1, 2})


def of_worker(server: Several, number: int | None) -> list[str]:
    return [line["to"] for line in server.events(EVENT) if line.get("worker") == number]


async def switched(server: Several, to: str, numbers: set[int | None]) -> None:
    """Sends the signal to the whole process group, as a terminal or a supervisor may."""
    for pid in (server.process.pid, *server.pids().values()):
        os.kill(pid, SWITCH_DEBUG)
    await until(lambda: all(of_worker(server, number)[-1:] == [to] for number in numbers), f"all log at {to}")


GATEWAY = """
import os, sys, time
from flywheel_server.deployment.gateway import GatewayThread
from flywheel_server.settings import Settings
gateway = GatewayThread(Settings(), None, 0)
gateway.start()
print("up", flush=True)
sys.stdin.read()
gateway.stop()
"""


@pytest.mark.thorough
async def test_a_gateway_switches_beside_the_signals_of_modal() -> None:
    environment = {
        "FLYWHEEL_ENGINE": "scripted",
        "FLYWHEEL_ADDRESS": "127.0.0.1:0",
        "FLYWHEEL_API_KEYS": "0123456789abcdef",
        "FLYWHEEL_WITHDRAW_WINDOW": "0",
        "FLYWHEEL_LOG_LEVEL": "error",
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", GATEWAY, stdin=PIPE, stdout=PIPE, stderr=PIPE, env={**os.environ, **environment}
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert await asyncio.wait_for(process.stdout.readline(), 30) == b"up\n"
    log = Log(process)
    for switches in (["debug"], ["debug", "error"], ["debug", "error", "debug"]):
        process.send_signal(SWITCH_DEBUG)
        await until(partial(log.has_switched, switches), "it has switched")
    process.stdin.close()
    await asyncio.wait_for(log.reading, 30)
    assert await process.wait() == 0
    assert "stopping" in {line["event"] for line in log.lines}
