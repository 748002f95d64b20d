"""Measures for how long scrapes of the metrics hold the event loop: `python -m benchmarks.scrapes [--seconds 10]`.

The server has the scripted engine, and streams to 32 callers in another process. Its metrics are as large as strangers can make
them: 100 named callers with long names, and each method with each status. It is measured without scrapes, and then with scrapes
one after the other. Each callback of the event loop is timed, in CPU time, because other programs do not disturb that. uvloop
offers no way to time callbacks; asyncio's own loop, which is slower, takes the same steps.
"""

import argparse
import asyncio
import logging
import os
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final
from unittest.mock import patch

from benchmarks.peers import ONE_POLLER
from benchmarks.scenarios import TEXT

os.environ.update(ONE_POLLER)

import grpc
import structlog
from flywheel_client import AsyncClient
from flywheel_server import metrics_endpoint
from flywheel_server.engines.scripted import Script, ScriptedEngine
from flywheel_server.server import serve
from flywheel_server.settings import Settings
from flywheel_server.telemetry.calls import CallRecord
from flywheel_server.telemetry.metrics import MAX_CALLERS, Metrics

STREAMS: Final = 32
TOKEN_DELAY: Final = 0.02
METHODS: Final = ("Generate", "GenerateDeltas", "GenerateAll", "Tokenize", "GetModel", "GetStats")


class Times:
    """The CPU time and the durations of the callbacks of an event loop, in seconds."""

    def __init__(self) -> None:
        self.cpu: list[float] = []
        self.wall: list[float] = []

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Measures each callback in the context. It overrides a private method, because there is no public way."""
        run_callback = asyncio.Handle._run  # noqa: SLF001

        def timed(handle: asyncio.Handle) -> None:
            started, started_cpu = time.perf_counter(), time.thread_time()
            run_callback(handle)
            self.cpu.append(time.thread_time() - started_cpu)
            self.wall.append(time.perf_counter() - started)

        with patch.object(asyncio.Handle, "_run", timed):
            yield

    def row(self, name: str, scrapes: int) -> str:
        """Returns a row of the table."""
        cpu, wall = sorted(self.cpu), sorted(self.wall)
        shown = [cpu[-1], cpu[int(len(cpu) * 0.9999)], cpu[int(len(cpu) * 0.99)], wall[-1], wall[int(len(wall) * 0.99)]]
        return f"| {name} | {scrapes} | {len(cpu)} | {' | '.join(f'{1000 * each:.2f} ms' for each in shown)} |"


def fill(metrics: Metrics) -> None:
    """Gives the metrics as many labels as callers can make."""
    for number in range(MAX_CALLERS):
        for code in grpc.StatusCode:
            call = CallRecord(f"flywheel.v1.GenerationService/{METHODS[number % len(METHODS)]}", "", "")
            call.caller = f"{number} {'🦙' * 200}"
            call.operation, call.model = ("chat", "text_completion")[number % 2], "model"
            call.queued_at = call.admitted_at = call.started_at = call.first_output_at = call.began
            call.ended_at, call.code = call.began, code
            call.samples, call.token_seconds = [(call.began, 2, "stop")], [0.0]
            metrics.end(call)


async def load(address: str) -> None:
    """Streams from the server until the process is ended."""

    async def stream(client: AsyncClient) -> None:
        while True:
            async for _ in client.generate_deltas("x", max_tokens=500):
                pass

    async with AsyncClient(address) as client:
        await asyncio.gather(*(stream(client) for _ in range(STREAMS)))


async def scrape(port: int) -> int:
    """Returns the bytes of an answer, which is compressed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nAccept-Encoding: gzip\r\n\r\n")
    size = len(await reader.read())
    writer.close()
    return size


async def during(seconds: float, work: Callable[[], Awaitable[Any]]) -> tuple[Times, int]:
    """Repeats the work for so long. Returns the durations of all callbacks meanwhile, and how often the work was done."""
    times, count = Times(), 0
    with times.measuring(), suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while True:
                await work()
                count += 1
    return times, count


async def measured(seconds: float) -> None:
    """Runs the server, and prints the table."""
    made: list[Metrics] = []
    create = metrics_endpoint.create_metrics

    def create_and_keep(settings: Settings) -> Metrics | None:
        metrics = create(settings)
        made.extend(filter(None, [metrics]))
        return metrics

    with patch("flywheel_server.reporting.create_metrics", create_and_keep):
        settings = Settings(address="127.0.0.1:0", metrics_address="127.0.0.1:39464", withdraw_window=0, drain_timeout=0)
        async with serve(ScriptedEngine(Script(text=TEXT, token_delay=TOKEN_DELAY)), settings) as port:
            fill(made[0])
            client = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "benchmarks.scrapes", "--load", f"127.0.0.1:{port}")
            )
            try:
                await asyncio.sleep(3)
                without, _ = await during(seconds, lambda: asyncio.sleep(0.1))
                size = await scrape(39464)
                scraped, count = await during(seconds, lambda: scrape(39464))
            finally:
                client.kill()
                await client.wait()
    print(f"An answer has {size} bytes.\n")
    print(
        "| | scrapes | callbacks | longest | 99.99 % | 99 % | longest by the clock | 99 % |\n|---|---|---|---|---|---|---|---|"
    )
    print(without.row("without scrapes", 0))
    print(scraped.row("with scrapes", count))


def main() -> None:
    """Measures, or is the client."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--load", help=argparse.SUPPRESS)
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    asyncio.run(load(options.load) if options.load else measured(options.seconds))


if __name__ == "__main__":
    main()
