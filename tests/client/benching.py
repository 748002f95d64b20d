"""Runs `flywheel bench` as a process of its own, against servers that run in the test."""

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import grpc.aio
import pytest
from flywheel_proto._service_name import SERVICE_NAME
from flywheel_proto.v1 import generation_pb2

from tests.client.command import FLYWHEEL

WITHIN = 0.05
"""The share by which figures may differ from the pace of the server."""


class Run(NamedTuple):
    """The exit code of a run, what it wrote, and its report."""

    code: int
    stdout: str
    stderr: str
    report: dict[str, Any]

    def errors(self) -> dict[tuple[str, str], int]:
        """Returns how many calls failed, by code and reason."""
        return {(error["code"], error["reason"]): error["count"] for error in self.report["errors"]}

    def latency(self, name: str, figure: str) -> float:
        """Returns a figure of a latency, in seconds."""
        return float(self.report["latencies"][name][figure])


async def bench(address: str, report: Path, *arguments: str) -> Run:
    """Runs the bench to its end. Writes the report to the file."""
    command = [*FLYWHEEL, "bench", "--address", address, "--json", str(report), *arguments]
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | {"PYTHONUTF8": "1"},
    )
    stdout, stderr = await asyncio.wait_for(process.communicate(), 60)
    text = await asyncio.to_thread(report.read_text)
    return Run(process.returncode or 0, stdout.decode(), stderr.decode(), json.loads(text))


async def agreeing(expected: Mapping[tuple[str, str], float], run: Callable[[], Awaitable[Run]]) -> Run:
    """Makes runs, at most three, until the figures of latencies agree with the expected seconds. Returns the last run.

    A machine that is busy with other tests makes servers and the bench late.
    """
    for last in (False, False, True):
        made = await run()
        found = {(name, figure): made.latency(name, figure) for name, figure in expected}
        if last or found == pytest.approx(expected, rel=WITHIN):
            break
    assert found == pytest.approx(expected, rel=WITHIN)
    return made


class PacedService:
    """Sends one delta for each call, after as many seconds as the text of the request says."""

    def __init__(self) -> None:
        self.stalled_from = float("inf")
        """Seconds after the first call at which the service stalls."""
        self.stalled_until = 0.0
        """Seconds after the first call at which the service goes on."""
        self.calls = 0
        self._first_call = 0.0

    async def generate_deltas(
        self, request: generation_pb2.GenerationRequest, context: Any
    ) -> AsyncIterator[generation_pb2.GenerationDelta]:
        self.calls += 1
        self._first_call = self._first_call or time.monotonic()
        await asyncio.sleep(float(request.text))
        seconds = time.monotonic() - self._first_call
        if self.stalled_from <= seconds < self.stalled_until:
            await asyncio.sleep(self.stalled_until - seconds)
        yield generation_pb2.GenerationDelta(text="a", generated_tokens=1, finish_reason="stop", prompt_tokens=2)


@asynccontextmanager
async def paced() -> AsyncIterator[tuple[str, PacedService]]:
    """Serves a `PacedService`, which has no other method, not even GetModel. Gives its address."""
    service = PacedService()
    server = grpc.aio.server()
    handler = grpc.unary_stream_rpc_method_handler(
        service.generate_deltas,
        generation_pb2.GenerationRequest.FromString,
        generation_pb2.GenerationDelta.SerializeToString,
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, {"GenerateDeltas": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}", service
    finally:
        await server.stop(None)
