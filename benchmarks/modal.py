"""Measures what the gateway adds to a call on Modal, compared with a direct call of `Model.generate` by Modal's client.

    python -m benchmarks.modal

Both call the same container, which plays a script without delays, so that only the time of the transport is left. Modal is the
stand-in of the tests, in a process of its own on this machine, so its share of a call is small: loopback and Python. On the
real Modal that share is many times larger, but what the gateway adds is the same.
"""

import asyncio
import os
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

import modal
from flywheel_client import AsyncClient

from benchmarks.modal_cloud import APP, modal_cloud
from benchmarks.serving import flywheel_server

CONCURRENCY: Final = (1, 16, 128)
CALLS: Final = 256
ROUNDS: Final = 5
FIELDS: Final[dict[str, Any]] = {"text": "x" * 400, "max_tokens": 16}


def main() -> None:
    """Measures, and prints a table."""
    with modal_cloud() as cloud:
        os.environ.update(cloud.environ)
        with flywheel_server("--engine", "flywheel", "--modal-app", APP) as address:
            asyncio.run(_compare(address))


async def _compare(address: str) -> None:
    model = modal.Cls.from_name(APP, "Model").with_options(gpu="A10G", timeout=600)()
    async with AsyncClient(address) as client:

        async def unary() -> None:
            await client.generate_all(**FIELDS)

        async def deltas() -> None:
            async with client.generate_deltas(**FIELDS) as stream:
                async for _ in stream:
                    pass

        async def direct() -> None:
            await model.generate.remote.aio(**FIELDS)

        methods = {"direct": direct, "GenerateAll": unary, "GenerateDeltas": deltas}
        print(f"{'at a time':>10} {'call':>15} {'ms/call':>8} {'added ms':>9} {'ratio':>6}   (ratio of each round)")
        for concurrency in CONCURRENCY:
            for call in methods.values():
                await _milliseconds(call, concurrency)
            rounds = [{name: await _milliseconds(call, concurrency) for name, call in methods.items()} for _ in range(ROUNDS)]
            for name in methods:
                times = [measured[name] for measured in rounds]
                added = [measured[name] - measured["direct"] for measured in rounds]
                ratios = [measured[name] / measured["direct"] for measured in rounds]
                print(
                    f"{concurrency:>10} {name:>15} {statistics.median(times):>8.1f} {statistics.median(added):>9.1f} "
                    f"{statistics.median(ratios):>6.2f}   ({', '.join(f'{ratio:.2f}' for ratio in ratios)})"
                )


async def _milliseconds(call: Callable[[], Awaitable[None]], concurrency: int) -> float:
    """Returns the average milliseconds of a call, with `concurrency` concurrent calls."""
    taken: list[float] = []

    async def caller() -> None:
        for _ in range(max(1, CALLS // concurrency)):
            start = time.perf_counter()
            await call()
            taken.append(time.perf_counter() - start)

    await asyncio.gather(*(caller() for _ in range(concurrency)))
    return 1000 * statistics.mean(taken)


if __name__ == "__main__":
    main()
