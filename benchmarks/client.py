"""Measures the CPU time of a delta in the Python clients: `python -m benchmarks.client`.

A process reads a stream of GenerateDeltas with `Client` or `AsyncClient`, and with the generated stub on a plain channel of the
same kind, which returns the messages unchanged. The server is a separate process.
"""

import argparse
import asyncio
import os
import statistics
import sys
import time
from collections.abc import AsyncIterable, Callable
from typing import Final

import grpc
import grpc.aio
from flywheel_client import AsyncClient, Client
from flywheel_proto.v1 import generation_pb2, generation_pb2_grpc

from benchmarks.peers import ONE_POLLER
from benchmarks.serving import started

PROMPT: Final = "Once upon a time"
DELTAS: Final = 10_000


def request(max_tokens: int) -> generation_pb2.GenerationRequest:
    """Returns the request of the stubs."""
    return generation_pb2.GenerationRequest(text=PROMPT, max_tokens=max_tokens)


def stub(address: str) -> float:
    """Returns the µs of CPU time for each delta with the synchronous stub."""
    with grpc.insecure_channel(address) as channel:
        generate_deltas = generation_pb2_grpc.GenerationServiceStub(channel).GenerateDeltas
        return cost(lambda count: sum(1 for _ in generate_deltas(request(count))))


def client(address: str) -> float:
    """Returns the µs of CPU time for each delta with `Client`."""
    with Client(address) as client:
        return cost(lambda count: sum(1 for _ in client.generate_deltas(PROMPT, max_tokens=count)))


def aio_stub(address: str) -> float:
    """Returns the µs of CPU time for each delta with the asyncio stub."""

    async def run() -> float:
        async with grpc.aio.insecure_channel(address) as channel:
            generate_deltas = generation_pb2_grpc.GenerationServiceStub(channel).GenerateDeltas
            return await async_cost(lambda count: generate_deltas(request(count)))

    return asyncio.run(run())


def async_client(address: str) -> float:
    """Returns the µs of CPU time for each delta with `AsyncClient`."""

    async def run() -> float:
        async with AsyncClient(address) as client:
            return await async_cost(lambda count: client.generate_deltas(PROMPT, max_tokens=count))

    return asyncio.run(run())


PAIRS: Final[dict[str, tuple[Callable[[str], float], Callable[[str], float]]]] = {
    "Client": (client, stub),
    "AsyncClient": (async_client, aio_stub),
}


def cost(read: Callable[[int], int]) -> float:
    """Returns the µs of CPU time for each delta. `read` reads a stream of the given number of deltas, and counts them."""
    read(1)  # connects
    begun = time.process_time()
    return per_delta(read(DELTAS), begun)


async def async_cost(open_stream: Callable[[int], AsyncIterable[object]]) -> float:
    """Returns the µs of CPU time for each delta, for asyncio. `open_stream` opens a stream of the given number of deltas."""
    async for _ in open_stream(1):
        pass
    begun = time.process_time()
    return per_delta(len([1 async for _ in open_stream(DELTAS)]), begun)


def per_delta(count: int, begun: float) -> float:
    """Returns the µs of CPU time for each delta of a stream that began at the process time `begun`."""
    if count != DELTAS:
        raise RuntimeError(f"{count} deltas have come, not {DELTAS}")
    return (time.process_time() - begun) / DELTAS * 1e6


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    print("| client | µs for each delta | stub | ratio, median | rounds |\n|---|---|---|---|---|")
    server = [sys.executable, "-m", "benchmarks.peers.bare", "--text", "llama"]
    with started(server, os.environ | ONE_POLLER) as (_, address):
        rounds = [
            {name: (read(address), read_bare(address)) for name, (read, read_bare) in PAIRS.items()}
            for _ in range(given.rounds)
        ]
    for name in PAIRS:
        ratios = [one[name][0] / one[name][1] for one in rounds]
        medians = [f"{statistics.median(column):.1f}" for column in zip(*(one[name] for one in rounds), strict=True)]
        each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"| {name} | {' | '.join(medians)} | {statistics.median(ratios):.2f} | {each} |")


if __name__ == "__main__":
    main()
