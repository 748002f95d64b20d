"""Runs a server, and observes how well it serves a well-behaved client."""

import asyncio
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, Final, TypeVar

import grpc
import grpc.aio
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_proto.v1 import generation_pb2_grpc

T = TypeVar("T")

REQUEST: Final = pb.GenerationRequest(text="x", max_tokens=4)
TIMEOUT: Final = 5.0
"""The seconds that a call of the client may take."""
CALL_INTERVAL: Final = 0.02
"""Seconds between two calls of a client that stays connected, by default."""
CALLS_PER_CONNECT: Final = 5
"""Calls of that client for each call of a client that connects anew."""
LOOK_INTERVAL: Final = 0.05
MEBIBYTE: Final = 2**20


@dataclass(frozen=True)
class ServerProcess:
    """A real server in a process of its own."""

    address: str
    process: "subprocess.Popen[str]"
    log: Path
    api_key: str
    """The metadata that callers must send; empty without keys."""

    def resident(self) -> float:
        """Returns how much memory the process has, in MiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) * 1024 / MEBIBYTE

    def descriptors(self) -> int:
        """Returns how many file descriptors the process has open."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def logged(self) -> int:
        """Returns how many lines the process has written to its log."""
        with self.log.open("rb") as lines:
            return sum(1 for _ in lines)

    def is_alive(self) -> bool:
        """Returns whether the process runs."""
        return self.process.poll() is None


@contextmanager
def flywheel_server(*arguments: str, api_key: str = "") -> Iterator[ServerProcess]:
    """Runs `flywheel-server` with these arguments on a free port, and yields it when it is ready."""
    environment = {**os.environ, **({"FLYWHEEL_API_KEYS": api_key} if api_key else {})}
    # As text, because checks count the lines of the log.
    options = ("--address", "127.0.0.1:0", "--log-level", "error", "--log-format", "text")
    command = [sys.executable, "-m", "flywheel_server", *options, *arguments]
    with (
        NamedTemporaryFile() as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment) as process,  # noqa: S603 - ours
    ):
        try:
            line = process.stdout.readline() if process.stdout else ""
            address = re.search(r"[\d.]+:\d+", line)
            if address is None:
                raise RuntimeError(f"the server did not start: {Path(log.name).read_text()}")
            yield ServerProcess(address[0], process, Path(log.name), api_key)
        finally:
            process.kill()


@dataclass
class Served:
    """The calls of a well-behaved client: the seconds that each took, and how many failed with each status."""

    seconds: list[float] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)

    def median(self) -> float:
        """Returns the median of the seconds; infinite if no call was served."""
        return statistics.median(self.seconds) if self.seconds else float("inf")

    def p99(self) -> float:
        """Returns the seconds within which 99 of 100 calls were served; infinite if too few were served."""
        return statistics.quantiles(self.seconds, n=100, method="inclusive")[-1] if len(self.seconds) > 1 else float("inf")

    def __str__(self) -> str:
        failures = "".join(f", {count} {status}" for status, count in self.failures.items())
        return f"{len(self.seconds)} of {len(self.seconds) + self.failures.total()}{failures}"


@dataclass
class Observation:
    """The observation of a server for a while."""

    held: Served = field(default_factory=Served)
    """The calls of a client that had been connected before."""
    new: Served = field(default_factory=Served)
    """The calls of clients that connect anew for each."""
    resident: float = 0
    """The most memory that the server had, in MiB."""
    descriptors: int = 0
    """The most file descriptors that the server had."""


@asynccontextmanager
async def observing(server: ServerProcess, call_interval: float = CALL_INTERVAL) -> AsyncIterator[Observation]:
    """Calls the server every `call_interval` seconds, and observes it, until the context ends.

    A call begins on time even if earlier calls have not ended, as with independent callers. So a server that stands still for a
    second delays all calls of that second, not one.
    """
    observation = Observation()
    calls: list[asyncio.Task[None]] = []
    async with grpc.aio.insecure_channel(server.address) as channel:
        await _call(channel, server.api_key, Served())

        def look() -> None:
            with suppress(OSError, IndexError):  # the server may end at any moment
                observation.resident = max(observation.resident, server.resident())
                observation.descriptors = max(observation.descriptors, server.descriptors())

        def call() -> None:
            calls.append(asyncio.create_task(_call(channel, server.api_key, observation.held)))

        def connect_and_call() -> None:
            calls.append(asyncio.create_task(_connect_and_call(server, observation.new)))

        every = {look: LOOK_INTERVAL, call: call_interval, connect_and_call: call_interval * CALLS_PER_CONNECT}
        observers = [asyncio.create_task(_repeat(action, interval)) for action, interval in every.items()]
        try:
            yield observation
        finally:
            for observer in observers:
                observer.cancel()
            await asyncio.gather(*observers, return_exceptions=True)
            await asyncio.gather(*calls)


async def elsewhere(function: Callable[..., T], *arguments: object) -> T:
    """Runs the function in a process of its own, at a lower priority: what it computes is no part of the attack."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), os.nice, (10,)) as process:
        return await asyncio.get_running_loop().run_in_executor(process, partial(function, *arguments))


async def _repeat(action: Callable[[], None], interval: float) -> None:
    """Acts every so many seconds. When it comes late, it makes up for all missed times at once."""
    clock = asyncio.get_running_loop().time
    due = clock()
    while True:
        action()
        due += interval
        await asyncio.sleep(due - clock())


async def _connect_and_call(server: ServerProcess, served: Served) -> None:
    async with grpc.aio.insecure_channel(server.address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        await _call(channel, server.api_key, served)


async def _call(channel: grpc.aio.Channel, api_key: str, served: Served) -> None:
    stub: Any = generation_pb2_grpc.GenerationServiceStub(channel)
    start = time.perf_counter()
    try:
        await stub.GenerateAll(REQUEST, timeout=TIMEOUT, metadata=(("authorization", f"Bearer {api_key}"),) if api_key else ())
        served.seconds.append(time.perf_counter() - start)
    except grpc.aio.AioRpcError as error:
        served.failures[error.code().name] += 1


def print_row(cells: Sequence[str]) -> None:
    """Prints a row of a Markdown table."""
    print("|", " | ".join(cells), "|", flush=True)


def ratio(over: float, under: float) -> str:
    """Returns the ratio of two numbers for a table, such as `1.5x`."""
    return f"{over / under:.1f}x" if over < float("inf") else "-"
