"""Looks for leaks in the server: makes calls of all kinds for ten minutes, a fifth cancelled and a twentieth failing.

    python -m benchmarks.soak [--seconds 600] [--calls 100000] [--output benchmarks]

The server is a separate process with the scripted engine. Each call must end with one known status. Writes `soak.md` and
`soak.svg` into the folder, and exits with 1 if a call is lost, or if something leaks. Linux only.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from random import Random
from typing import Final, TextIO

import grpc
import uvloop
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.system.cores import usable_cores
from grpc import StatusCode

from benchmarks import soak_calls
from benchmarks.plot import Panel, chart
from benchmarks.soak_calls import KINDS, Calls, Kind
from tests.serving import connected

API_KEY: Final = "the-key-of-the-soak"
SCRIPT: Final = {
    "prompt_delay": soak_calls.PROMPT_DELAY,
    "token_delay": soak_calls.TOKEN_DELAY,
    "fail_on": soak_calls.FAIL_ON,
    "fail_after": soak_calls.FAIL_AFTER,
}
SETTINGS: Final = {
    "--engine": "scripted",
    "--script": json.dumps(SCRIPT),
    "--address": "127.0.0.1:0",
    "--max-message-bytes": str(soak_calls.MAX_MESSAGE_BYTES),
    # Calls also wait in the queue, and none is refused.
    "--max-concurrent": "40",
    "--max-queued": "100000",
    # Connections are replaced all the time.
    "--max-connection-age": "30",
    "--log-format": "json",
}
SAMPLES: Final = 200
"""Number of measurements during the calls."""
WINDOWS: Final = 20
"""Number of equal parts of the time, for each of which the median memory is computed."""
WARM_UP_WINDOWS: Final = 2
"""Number of windows at the beginning that are ignored: a minute of ten."""
MAX_GROWTH: Final = 1.05
"""Maximum resident memory, as a multiple of the resident memory after the first minute."""
WARM_UP_CALLS: Final = 1000
SETTLE_SECONDS: Final = 5.0
"""Seconds after the warm-up calls before the first measurement."""
LOST_CALL_TIMEOUT: Final = 60.0
"""Seconds after which a call counts as lost. After the calls, the server has as many seconds to release its resources."""
MIB: Final = 2**20


@dataclass(frozen=True, slots=True)
class Figures:
    """The resources of the server at a time: `resident` in bytes, the others as numbers."""

    second: float
    resident: int
    descriptors: int
    threads: int
    tasks: int


@dataclass
class Result:
    """The result of the soak.

    Attributes:
        statuses: The number of calls by kind and status. The status is None if the call was lost.
        figures: The resources during the calls.
        before: The resources at rest before the calls.
        after: The resources at rest after the calls.
        stats: The answer of GetStats after the calls.
        unexpected: Warnings and errors in the server's log that no call explains.
        seconds: Seconds that the calls took.
    """

    statuses: Counter[tuple[Kind, StatusCode | None]] = field(default_factory=Counter)
    figures: list[Figures] = field(default_factory=list)
    before: Figures = field(init=False)
    after: Figures = field(init=False)
    stats: pb.Stats = field(init=False)
    unexpected: list[str] = field(default_factory=list)
    seconds: float = 0


def main() -> None:
    """Runs the soak, and prints and writes its report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description="Looks for leaks in the server.")
    parser.add_argument("--seconds", type=float, default=600, help="seconds in which calls begin; default: 600")
    parser.add_argument("--calls", type=int, default=100_000, help="number of calls; default: 100000")
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks"), help="the folder for the report; default: benchmarks"
    )
    arguments = parser.parse_args()
    result = uvloop.run(_soak(arguments.calls, arguments.seconds))
    criteria = _criteria(result)
    report = _report(result, criteria)
    print(report)
    print(*result.unexpected, sep="", file=sys.stderr)
    (arguments.output / "soak.md").write_text(report)
    (arguments.output / "soak.svg").write_text(_plot(result))
    sys.exit(not all(holds for _, _, holds in criteria))


class _Server:
    """The measured server, in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process, address: str) -> None:
        self.address = address
        self._process = process
        self._start = time.monotonic()

    async def figures(self) -> Figures:
        """Returns the current resources."""
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("the server has no pipes")
        self._process.stdin.write(b"\n")
        answer = json.loads(await self._process.stdout.readline())
        return Figures(time.monotonic() - self._start, **answer)

    async def at_rest(self, before: Figures) -> Figures:
        """Waits until the resources are no more than before, for at most `LOST_CALL_TIMEOUT`, and returns them."""
        deadline = time.monotonic() + LOST_CALL_TIMEOUT
        while True:
            figures = await self.figures()
            is_back = figures.descriptors <= before.descriptors and figures.tasks <= before.tasks
            if is_back or time.monotonic() > deadline:
                return figures
            await asyncio.sleep(1)


@asynccontextmanager
async def _server(log: TextIO) -> AsyncIterator[_Server]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.soak_server", *chain(*SETTINGS.items())),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env={**os.environ, "FLYWHEEL_API_KEYS": API_KEY},
    )
    try:
        address = (await process.stdout.readline()).decode().strip() if process.stdout else ""
        if not address:
            raise RuntimeError("the server did not start")
        yield _Server(process, address)
    finally:
        if process.stdin:
            process.stdin.close()
        await process.wait()


async def _soak(calls: int, seconds: float) -> Result:
    result = Result()
    random = Random(1)  # noqa: S311 - the same calls in each run
    with tempfile.TemporaryFile("w+") as log:
        async with _server(log) as server:
            await _call(server.address, WARM_UP_CALLS, WARM_UP_CALLS / 100, random)
            await asyncio.sleep(SETTLE_SECONDS)
            result.before = await server.figures()
            start = time.monotonic()
            calling = asyncio.create_task(_call(server.address, calls, seconds, random))
            while not calling.done():
                result.figures.append(await server.figures())
                await asyncio.wait((calling,), timeout=seconds / SAMPLES)
            result.statuses = await calling
            result.seconds = time.monotonic() - start
            result.after = await server.at_rest(result.before)
            async with connected(server.address) as target:
                metadata = (("authorization", f"Bearer {API_KEY}"),)
                result.stats = await target.stub.GetStats(pb.GetStatsRequest(), metadata=metadata)
        log.seek(0)
        result.unexpected = [line for line in log if _is_unexpected(line)]
    return result


async def _call(address: str, number: int, seconds: float, random: Random) -> Counter[tuple[Kind, StatusCode | None]]:
    """Makes `number` calls at random times, and returns the number of calls by kind and status."""
    statuses: Counter[tuple[Kind, StatusCode | None]] = Counter()
    calls = Calls(address, API_KEY, random)

    async def call(kind: Kind) -> None:
        done, lost = await asyncio.wait((asyncio.ensure_future(kind.call(calls)),), timeout=LOST_CALL_TIMEOUT)
        statuses[kind, None if lost else done.pop().result()] += 1
        for task in lost:
            task.cancel()

    kinds = [kind for kind in KINDS for _ in range(number * kind.per_thousand // 1000)]
    random.shuffle(kinds)
    due = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for kind in kinds:
            due += random.expovariate(number / seconds)
            await asyncio.sleep(max(0, due - time.monotonic()))
            group.create_task(call(kind))
    await calls.close()
    return statuses


def _is_unexpected(line: str) -> bool:
    try:
        entry = json.loads(line)
    except ValueError:
        return True
    return entry["level"] not in ("debug", "info") and "the script says so" not in line


def _windows(result: Result) -> list[float]:
    """Returns the median resident memory in MiB of each window after the warm-up."""
    length = result.seconds / WINDOWS
    windows: list[list[float]] = [[] for _ in range(WINDOWS)]
    start = result.figures[0].second
    for figures in result.figures:
        windows[min(int((figures.second - start) / length), WINDOWS - 1)].append(figures.resident / MIB)
    return [statistics.median(window) for window in windows[WARM_UP_WINDOWS:]]


def _criteria(result: Result) -> list[tuple[str, str, bool]]:
    """Returns the criteria: each with its text, the measured values, and whether it is met."""
    wrong = sum(count for (kind, status), count in result.statuses.items() if status is not kind.status)
    first, highest = (windows := _windows(result))[0], max(windows)
    before, after, stats = result.before, result.after, result.stats
    return [
        ("every call ends with its expected status", f"{wrong} of {result.statuses.total()} did not", not wrong),
        (
            f"resident memory stays within {MAX_GROWTH - 1:.0%} of that after the first tenth of the time",
            f"{first:.1f} MiB, then at most {highest:.1f} MiB ({highest / first - 1:+.1%})",
            highest <= first * MAX_GROWTH,
        ),
        (
            "no more file descriptors at rest after the calls than before them",
            f"{before.descriptors} before, {after.descriptors} after",
            after.descriptors <= before.descriptors,
        ),
        ("no more tasks", f"{before.tasks} before, {after.tasks} after", after.tasks <= before.tasks),
        ("no generation under way", f"{stats.active} active, {stats.queued} queued", not stats.active and not stats.queued),
        (
            "no warning or error in the log except for the calls that fail",
            f"{len(result.unexpected)} others",
            not result.unexpected,
        ),
    ]


def _report(result: Result, criteria: Sequence[tuple[str, str, bool]]) -> str:
    total = result.statuses.total()
    circumstances = (
        f"{total} calls in {result.seconds:.0f} s, {datetime.now(UTC):%Y-%m-%d}, {usable_cores()} cores that callers and "
        f"server shared, grpcio {grpc.__version__}, Python {platform.python_version()}."
    )
    lines = [
        "# Soak",
        "",
        circumstances,
        "",
        "![Resident memory, file descriptors and tasks over the time](soak.svg)",
        "",
        "| criterion | measured | met |",
        "|---|---|---|",
        *(f"| {what} | {seen} | {'yes' if holds else '**no**'} |" for what, seen, holds in criteria),
        "",
        "| calls | share | expected status | as expected | other |",
        "|---|---|---|---|---|",
    ]
    for kind in KINDS:
        ended = {status: count for (of, status), count in result.statuses.items() if of is kind}
        as_they_must = ended.pop(kind.status, 0)
        others = ", ".join(f"{count} {status.name if status else 'not at all'}" for status, count in ended.items())
        lines.append(f"| {kind.name} | {kind.per_thousand / 10:g} % | {kind.status.name} | {as_they_must} | {others or '0'} |")
    return "\n".join([*lines, ""])


def _plot(result: Result) -> str:
    seconds = [figures.second - result.figures[0].second for figures in result.figures]
    return chart(
        seconds,
        (
            Panel(
                "Resident memory, MiB, and its limit after the first tenth of the time",
                [figures.resident / MIB for figures in result.figures],
                MAX_GROWTH * _windows(result)[0],
            ),
            Panel("File descriptors", [figures.descriptors for figures in result.figures]),
            Panel("Threads", [figures.threads for figures in result.figures]),
            Panel("asyncio tasks", [figures.tasks for figures in result.figures]),
        ),
    )


if __name__ == "__main__":
    main()
