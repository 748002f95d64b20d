"""Compares a server that gets four times as many calls as it can serve with the same server at its capacity.

    python -m benchmarks.overload

The server is a separate process with the scripted engine. Its callers do not retry. At capacity, as many callers as the server
serves at a time make one call after the other. In overload, calls come at random times, four times as many per second as were
served at capacity. Each round measures both. Exits with 1 if, in the median of the rounds, the median or the p99 of served
calls is more than 1.5 times that at capacity, or the p99 of refused calls is more than 50 ms. Exits with 1 also if a refused
call has no RetryInfo, or if a call is refused at capacity.
"""

import asyncio
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final

import grpc
import grpc.aio
import uvloop
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_proto.v1 import generation_pb2_grpc
from google.rpc import status_pb2
from google.rpc.error_details_pb2 import RetryInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.serving import flywheel_server
from tests.serving import as_dict

MAX_CONCURRENT: Final = 48
MAX_QUEUED: Final = MAX_CONCURRENT // 4
"""The same ratio to MAX_CONCURRENT as in the default settings."""
OVERLOAD_FACTOR: Final = 4
ROUNDS: Final = 5
ROUND_SECONDS: Final = 10.0
"""Seconds in which calls begin, at capacity and in overload."""
RAMP_UP_SECONDS: Final = 1.0
"""Seconds at the beginning whose calls do not count."""
SCRIPT: Final = {"prompt_delay": 0.1, "token_delay": 0.05}
TOKENS_RANGE: Final = (4, 16)
"""Minimum and maximum tokens of a call. Calls of one length would all end together, and delay waiting calls by that length."""

MAX_SERVED_RATIO: Final = 1.5
MAX_REFUSAL_SECONDS: Final = 0.05


@dataclass
class Round:
    """The results of a round, from the view of the callers.

    Attributes:
        served: Seconds of each served call.
        refused: Seconds of each refused call.
        health: Seconds of each health check.
        without_retry_info: Number of refused calls without RetryInfo.
    """

    served: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    health: list[float] = field(default_factory=list)
    without_retry_info: int = 0


def main() -> None:
    """Measures, and prints a table."""
    settings = {
        "--engine": "scripted",
        "--script": json.dumps(SCRIPT),
        "--max-concurrent": MAX_CONCURRENT,
        "--max-queued": MAX_QUEUED,
    }
    with flywheel_server(*(str(part) for setting in settings.items() for part in setting)) as address:
        rounds = uvloop.run(_run_rounds(address))
    sys.exit(not _report(rounds))


async def _run_rounds(address: str) -> list[tuple[Round, Round]]:
    channels = [grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) for _ in range(4)]
    await asyncio.gather(*(channel.channel_ready() for channel in channels))
    rounds = []
    for number in range(ROUNDS):
        random = Random(number)  # noqa: S311 - the same calls in each run
        at_capacity = await _at_capacity(channels, random)
        rate = OVERLOAD_FACTOR * MAX_CONCURRENT / statistics.mean(at_capacity.served)
        rounds.append((at_capacity, await _in_overload(channels, rate, random)))
    for channel in channels:
        await channel.close()
    return rounds


async def _at_capacity(channels: Sequence[grpc.aio.Channel], random: Random) -> Round:
    seen = Round()
    start = time.perf_counter()

    async def caller(number: int) -> None:
        await asyncio.sleep(RAMP_UP_SECONDS * number / MAX_CONCURRENT)
        while time.perf_counter() < start + ROUND_SECONDS:
            counts = time.perf_counter() > start + RAMP_UP_SECONDS
            await _generate(channels[number % len(channels)], random, seen if counts else Round())

    await asyncio.gather(*(caller(number) for number in range(MAX_CONCURRENT)), _check_health(channels, seen))
    return seen


async def _in_overload(channels: Sequence[grpc.aio.Channel], rate: float, random: Random) -> Round:
    seen = Round()
    due = start = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        group.create_task(_check_health(channels, seen))
        while due < start + ROUND_SECONDS:
            await asyncio.sleep(due - time.perf_counter())
            group.create_task(_generate(random.choice(channels), random, seen if due > start + RAMP_UP_SECONDS else Round()))
            due += random.expovariate(rate)
    return seen


async def _generate(channel: grpc.aio.Channel, random: Random, seen: Round) -> None:
    stub: Any = generation_pb2_grpc.GenerationServiceStub(channel)
    request = pb.GenerationRequest(text="Tell me of the llama.", max_tokens=random.randint(*TOKENS_RANGE))
    start = time.perf_counter()
    try:
        async for _ in stub.GenerateDeltas(request):
            pass
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
            raise
        seen.refused.append(time.perf_counter() - start)
        seen.without_retry_info += not _has_retry_info(error)
    else:
        seen.served.append(time.perf_counter() - start)


async def _check_health(channels: Sequence[grpc.aio.Channel], seen: Round) -> None:
    stub: Any = health_pb2_grpc.HealthStub(channels[0])
    end = time.perf_counter() + ROUND_SECONDS
    while (start := time.perf_counter()) < end:
        await stub.Check(health_pb2.HealthCheckRequest())
        seen.health.append(time.perf_counter() - start)
        await asyncio.sleep(0.1)


def _has_retry_info(error: grpc.aio.AioRpcError) -> bool:
    status = status_pb2.Status.FromString(as_dict(error.trailing_metadata()).get("grpc-status-details-bin", b""))
    return any(detail.Is(RetryInfo.DESCRIPTOR) for detail in status.details)


def _report(rounds: Sequence[tuple[Round, Round]]) -> bool:
    """Prints the results, and returns whether they meet the limits."""
    columns = (
        "served at capacity",
        "median ms",
        "p99",
        "served in overload",
        "median ms",
        "p99",
        "refused",
        "median ms",
        "p99",
    )
    print("|", " | ".join((*columns, "health p99 ms", "ratio of medians", "of p99")), "|")
    print("|" + "---|" * (len(columns) + 3))
    ratios: list[tuple[float, float]] = []
    for at_capacity, overloaded in rounds:
        ratios.append(
            (
                statistics.median(overloaded.served) / statistics.median(at_capacity.served),
                _p99(overloaded.served) / _p99(at_capacity.served),
            )
        )
        times = (_times(at_capacity.served), _times(overloaded.served), _times(overloaded.refused))
        print(
            "|", " | ".join((*times, f"{1000 * _p99(overloaded.health):.1f}", *(f"{ratio:.2f}" for ratio in ratios[-1]))), "|"
        )
    of_medians, of_p99 = (statistics.median(kind) for kind in zip(*ratios, strict=True))
    refusal = statistics.median(_p99(overloaded.refused) for _, overloaded in rounds)
    without = sum(at_capacity.without_retry_info + overloaded.without_retry_info for at_capacity, overloaded in rounds)
    needless = sum(len(at_capacity.refused) for at_capacity, _ in rounds)
    print()
    print(
        f"Served calls take {of_medians:.2f} times as long as at capacity (p99: {of_p99:.2f}); the limit is {MAX_SERVED_RATIO}."
    )
    print(f"99 % of the refusals come within {1000 * refusal:.1f} ms; the limit is {1000 * MAX_REFUSAL_SECONDS:.0f} ms.")
    print(f"{without} refused calls have no RetryInfo. At capacity, {needless} calls were refused.")
    return max(of_medians, of_p99) <= MAX_SERVED_RATIO and refusal <= MAX_REFUSAL_SECONDS and not without and not needless


def _times(seconds: Sequence[float]) -> str:
    return f"{len(seconds)} | {1000 * statistics.median(seconds):.1f} | {1000 * _p99(seconds):.1f}"


def _p99(seconds: Sequence[float]) -> float:
    return statistics.quantiles(seconds, n=100, method="inclusive")[-1]


if __name__ == "__main__":
    main()
