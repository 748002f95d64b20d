"""The command `flywheel-server`, run as a user runs it."""

import asyncio
import json
import os
import re
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import IO, Any

import grpc
import pytest
from flywheel_proto.v1 import generation_pb2 as pb

from tests.serving import connected
from tests.thorough import further

SCRIPTED = ["--engine", "scripted", "--address", "127.0.0.1:0"]


@asynccontextmanager
async def command(
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    setup: str = "",
    stdout: int | IO[bytes] = PIPE,
    stderr: int | IO[bytes] = PIPE,
) -> AsyncIterator[Process]:
    """Runs the command, after `setup` in the shell that becomes it. Its log is text, unless the arguments say otherwise."""
    process = await asyncio.create_subprocess_exec(
        *("sh", "-c", f'{setup}\nexec "$@"', "sh") if setup else (),
        *(sys.executable, "-m", "flywheel_server", *arguments),
        stdout=stdout,
        stderr=stderr,
        env={
            **os.environ,
            "NO_COLOR": "1",
            "FLYWHEEL_WITHDRAW_WINDOW": "0",
            "FLYWHEEL_LOG_FORMAT": "text",
            **(environment or {}),
        },
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def ready_line(process: Process, within: float = 30) -> tuple[str, str]:
    """Returns the line that the server prints when it is ready, within so many seconds, and the address in it."""
    assert process.stdout is not None
    async with asyncio.timeout(within):
        line = (await process.stdout.readline()).decode()
    found = re.search(r"127\.0\.0\.1:\d+", line)
    assert found, line
    return line, found[0]


@pytest.mark.parametrize("engine", [SCRIPTED, ["--address", "127.0.0.1:0"]], ids=["scripted", "embedded"])
@pytest.mark.parametrize("number", [signal.SIGTERM, *further([signal.SIGINT])])
async def test_it_says_when_it_is_ready_serves_and_stops_cleanly(engine: list[str], number: signal.Signals) -> None:
    async with command(*engine) as process:
        line, address = await ready_line(process)
        assert line.startswith("ready: grpcurl -plaintext -d '")
        assert line.rstrip().endswith(f"{address} flywheel.v1.GenerationService/GenerateDeltas")
        body = json.loads(line.split("'")[1])
        async with connected(address) as target:
            response = await target.stub.GenerateAll(pb.GenerationRequest(text=body["text"], max_tokens=3))
            assert response.responses[0].generated_tokens == 3
        process.send_signal(number)
        out, err = await asyncio.wait_for(process.communicate(), 20)
        assert process.returncode == 0, err
        assert not out
        assert b"Traceback" not in err


async def test_a_second_signal_ends_the_drain() -> None:
    async with command(*SCRIPTED, "--script", '{"token_delay": 0.05}') as process:
        _, address = await ready_line(process)
        async with connected(address) as target:
            call = target.stub.GenerateDeltas(pb.GenerationRequest(text="x", max_tokens=8000))
            await call.read()
            process.send_signal(signal.SIGTERM)
            while (await call.read()).generated_tokens < 20:
                pass
            assert process.returncode is None, "it drains"
            process.send_signal(signal.SIGTERM)
            await asyncio.wait_for(process.communicate(), 10)
    assert process.returncode == 0


async def test_a_generation_ends_when_the_drain_timeout_is_over() -> None:
    async with command("--address", "127.0.0.1:0", "--drain-timeout", "0.2") as process:
        _, address = await ready_line(process)
        async with connected(address) as target:
            call = target.stub.GenerateDeltas(pb.GenerationRequest(text="Write a very long story.", max_tokens=8000))
            await call.read()
            process.send_signal(signal.SIGTERM)
            _, err = await asyncio.wait_for(process.communicate(), 30)
            assert process.returncode == 0
            assert b"Traceback" not in err
            assert await _read_on(call) is grpc.StatusCode.UNAVAILABLE


async def _read_on(call: Any) -> grpc.StatusCode:
    try:
        while await call.read():
            pass
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--model", "/nowhere.gguf"], ["/nowhere.gguf", "--model"]),
        (["--engine", "scripted", "--address", "256.0.0.1:1"], ["256.0.0.1:1"]),
    ],
)
async def test_an_error_at_the_start_is_said_in_one_line(arguments: list[str], names: list[str]) -> None:
    async with command("--address", "127.0.0.1:0", *arguments) as process:
        out, err = await asyncio.wait_for(process.communicate(), 30)
        assert process.returncode == 1
        assert not out
        assert b"Traceback" not in err
        last = err.decode().strip().splitlines()[-1]
        assert last.startswith("flywheel-server: ")
        for name in names:
            assert name in last


async def test_an_address_that_is_taken_is_an_error() -> None:
    async with command(*SCRIPTED) as first:
        _, address = await ready_line(first)
        async with command("--engine", "scripted", "--address", address) as second:
            _, err = await asyncio.wait_for(second.communicate(), 20)
            assert second.returncode == 1
            assert address in err.decode()


async def test_the_log_can_be_json() -> None:
    async with command(*SCRIPTED, "--log-format", "json") as process:
        _, address = await ready_line(process)
        async with connected(address) as target:
            call = target.stub.GenerateAll(pb.GenerationRequest(), metadata=(("x-request-id", "id-7"),))
            assert await call.code()
        process.send_signal(signal.SIGTERM)
        _, err = await process.communicate()
    # A call is logged after its caller has the status, so that the line of the stop may come first.
    (line,) = (line for line in map(json.loads, err.splitlines()) if "request_id" in line)
    assert (line["request_id"], line["code"], line["level"]) == ("id-7", "INVALID_ARGUMENT", "info")
