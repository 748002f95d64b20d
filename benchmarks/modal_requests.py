"""Measures the flywheel engine: its requests to Modal's control plane, and the delay of the first token through its queue.

    python -m benchmarks.modal_requests

A gateway streams from a class that generates 50 tokens/s. Modal is the stand-in of the tests, which counts the requests of the
gateway and of the class. Requests that Modal's container runtime makes for itself do not count.
"""

import asyncio
import os
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Final

from flywheel_client import AsyncClient

from benchmarks.modal_cloud import APP, CloudProcess, modal_cloud
from benchmarks.serving import flywheel_server

TOKEN_DELAY: Final = 0.02
IDLE_SECONDS: Final = 60
FIRST_TOKEN_CALLS: Final = 40
RUNTIME_RPC_PREFIXES: Final = (
    "Container",
    "Task",
    "FunctionGetInputs",
    "FunctionPutOutputs",
    "FunctionGetDynamicConcurrency",
    "ClientHello",
)


def main() -> None:
    """Measures, and prints a table for each part."""
    with modal_cloud(token_delay=TOKEN_DELAY) as cloud:
        os.environ.update(cloud.environ)
        with flywheel_server("--engine", "flywheel", "--modal-app", APP) as address:
            asyncio.run(_measure(address, cloud))


async def _measure(address: str, cloud: CloudProcess) -> None:
    async with AsyncClient(address) as client:

        async def stream(tokens: int) -> float:
            """Returns the seconds until the first text."""
            begun = time.perf_counter()
            first = 0.0
            async with client.generate_deltas("x", max_tokens=tokens) as deltas:
                async for _ in deltas:
                    first = first or time.perf_counter() - begun
            return first

        async def streams(count: int, tokens: int) -> None:
            await asyncio.gather(*(stream(tokens) for _ in range(count)))

        async def first_tokens() -> list[float]:
            taken = []
            for _ in range(FIRST_TOKEN_CALLS):
                taken.append(await stream(2))
                await asyncio.sleep(0.5)
            return taken

        await streams(4, 5)
        print(f"{'what':>28} {'requests/token':>15} {'requests/s':>11}   by RPC")
        await _count("1 stream of 1,000 tokens", cloud, 1000, lambda: streams(1, 1000))
        await _count("64 streams of 1,000 tokens", cloud, 64_000, lambda: streams(64, 1000))
        await _count("an idle minute", cloud, None, lambda: asyncio.sleep(IDLE_SECONDS))
        print(f"\n{'first token, ms':>28} {'median':>7} {'p95':>7}   (the class makes it after {1000 * TOKEN_DELAY:.0f} ms)")
        _print_delays("of a call alone", await first_tokens())
        background = asyncio.create_task(streams(64, 1200))
        await asyncio.sleep(3)
        _print_delays("beside 64 streams", await first_tokens())
        await background


async def _count(what: str, cloud: CloudProcess, tokens: int | None, work: Callable[[], Awaitable[None]]) -> None:
    before, begun = cloud.requests(), time.monotonic()
    await work()
    made = Counter(
        {name: count for name, count in (cloud.requests() - before).items() if not name.startswith(RUNTIME_RPC_PREFIXES)}
    )
    per_token = f"{made.total() / tokens:.3f}" if tokens else ""
    by_rpc = ", ".join(f"{name} {count}" for name, count in made.most_common())
    print(f"{what:>28} {per_token:>15} {made.total() / (time.monotonic() - begun):>11.1f}   {by_rpc}", flush=True)


def _print_delays(what: str, seconds: list[float]) -> None:
    p95 = statistics.quantiles(seconds, n=20)[-1]
    print(f"{what:>28} {1000 * statistics.median(seconds):>7.0f} {1000 * p95:>7.0f}", flush=True)


if __name__ == "__main__":
    main()
