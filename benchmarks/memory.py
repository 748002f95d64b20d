"""Measures the memory of an open stream: `python -m benchmarks.memory`. Linux only.

Measures the resident memory of a server with 0, 500, 1,000 and 2,000 open streams of GenerateDeltas over ten connections, while
each stream gets a delta every two seconds. The servers are `flywheel-server`, with the scripted engine and an API key, and a
bare grpc.aio server with the same kind of messages. The difference is what our server adds to grpc's own memory.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
from collections.abc import AsyncIterable
from typing import Any, Final

import grpc.aio
import uvloop
from flywheel_proto.v1 import generation_pb2, generation_pb2_grpc

from benchmarks.peers import ONE_POLLER
from benchmarks.processes import resident_bytes
from benchmarks.serving import started

TOKEN_DELAY: Final = 2.0
"""Seconds between two deltas of a stream."""

CONNECTIONS: Final = 10
KEY: Final = "benchmarks-memory"
SETTLE_SECONDS: Final = 2 * TOKEN_DELAY
"""Seconds from the first delta of the last stream until memory is read, so that every stream gets another delta before."""


def ours(streams: int) -> tuple[list[str], dict[str, str]]:
    """Returns the command of our server for `streams` streams, and its additional environment variables."""
    script = {"token_delay": TOKEN_DELAY, "slots": streams}
    options = {"address": "127.0.0.1:0", "engine": "scripted", "log-level": "warning", "max-concurrent": str(streams)}
    flags = [text for name, value in options.items() for text in (f"--{name}", value)]
    return [sys.executable, "-m", "flywheel_server", *flags], {"FLYWHEEL_SCRIPT": json.dumps(script), "FLYWHEEL_API_KEYS": KEY}


async def measured(address: str, process: int, counts: list[int]) -> list[float]:
    """Returns the resident memory in KiB without streams, and with each of these numbers of streams."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(address, options) for _ in range(CONNECTIONS)]
    stubs: list[Any] = [generation_pb2_grpc.GenerationServiceStub(channel) for channel in channels]
    metadata = (("authorization", f"Bearer {KEY}"),)
    request = generation_pb2.GenerationRequest(text="Once upon a time", max_tokens=4)
    # What the first call loads or sets up is not the memory of a stream.
    await asyncio.gather(*(read(stub.GenerateDeltas(request, metadata=metadata), asyncio.Event()) for stub in stubs))
    found = [resident_bytes(process) / 1024]
    request.max_tokens = 1000
    async with asyncio.TaskGroup() as readers:
        open_streams: list[asyncio.Task[None]] = []
        for count in counts:
            new = [(stubs[number % CONNECTIONS], asyncio.Event()) for number in range(len(open_streams), count)]
            open_streams += [
                readers.create_task(read(stub.GenerateDeltas(request, metadata=metadata), first)) for stub, first in new
            ]
            await asyncio.gather(*(first.wait() for _, first in new))
            await asyncio.sleep(SETTLE_SECONDS)
            if any(stream.done() for stream in open_streams):
                raise RuntimeError("a stream ended early")
            found.append(resident_bytes(process) / 1024)
        for stream in open_streams:
            stream.cancel()
    return found


async def read(call: AsyncIterable[object], first: asyncio.Event) -> None:
    """Reads a stream to its end, and sets `first` when the first message arrives."""
    async for _ in call:
        first.set()


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, nargs="+", default=[500, 1000, 2000])
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    counts = sorted(given.streams)
    command, variables = ours(counts[-1] + CONNECTIONS)
    bare = [sys.executable, "-m", "benchmarks.peers.bare", "--text", "llama", "--delay", str(TOKEN_DELAY)]
    kinds = {"flywheel-server": (command, variables), "bare grpc.aio": (bare, ONE_POLLER)}
    per_stream: dict[str, list[list[float]]] = {kind: [] for kind in kinds}
    for _ in range(given.rounds):
        for kind, (one, its) in kinds.items():
            with started(one, os.environ | its) as (process, address):
                empty, *full = uvloop.run(measured(address, process, counts))
            per_stream[kind].append([(memory - empty) / count for memory, count in zip(full, counts, strict=True)])
    print("| streams | flywheel-server, KiB per stream | bare grpc.aio | difference, median | rounds |\n|---|---|---|---|---|")
    for number, count in enumerate(counts):
        of_ours, of_bare = ([one[number] for one in per_stream[kind]] for kind in kinds)
        added = [one - other for one, other in zip(of_ours, of_bare, strict=True)]
        medians = [f"{statistics.median(each):.1f}" for each in (of_ours, of_bare, added)]
        print(f"| {count} | {' | '.join(medians)} | {', '.join(f'{each:.1f}' for each in added)} |")


if __name__ == "__main__":
    main()
