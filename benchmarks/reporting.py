"""Measures what metrics, traces and the log of calls cost the server: `python -m benchmarks.reporting [--rounds 5]`.

Each server has the scripted engine and one of the ways to report on calls. All run at the same time, and take turns of half a
second with calls, and of three seconds with deltas, so that a slow second of the machine affects all of them. Each round has
new servers, in another order, because two processes of the same program may differ by some percent for as long as they run. A
second server that reports nothing shows how much of a ratio is chance. The receiver of traces and metrics is in the process of
the load, so its CPU time does not count.
"""

import argparse
import asyncio
import json
import os
import random
import socket
import statistics
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Final

import grpc
import grpc.aio
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_proto.v1 import generation_pb2_grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from benchmarks.processes import cpu_seconds
from benchmarks.serving import started

CALLERS: Final = 16
CALLS: Final = 608
TURNS: Final = 6
"""Turns of `CALLS` calls that each server gets in a round. It gets half as many turns of `STREAMS` streams."""

WARMING: Final = 160
"""Calls before each turn that do not count: a server under load has had no pause, and so no traces saved up."""

STREAMS: Final = 64
TOKENS: Final = 150
SCRIPT: Final = {"text": "The llama walks. ", "bytes_per_token": 4, "token_delay": 0.02}

REPORTS: Final[Mapping[str, Sequence[str]]] = {
    "nothing": ("--slow-call", "0"),
    "nothing, a second time": ("--slow-call", "0"),
    "slow calls (default)": (),
    "metrics": ("--slow-call", "0", "--metrics-address", "METRICS"),
    "a line for each call": ("--log-calls", "1"),
    "traces and metrics over OTLP": ("--slow-call", "0", "--otlp-endpoint", "OTLP"),
    "the same, all calls traced": ("--slow-call", "0", "--otlp-endpoint", "OTLP"),
    "everything": ("--log-calls", "1", "--metrics-address", "METRICS", "--otlp-endpoint", "OTLP"),
}
"""The flags of each server."""

ALL_TRACED: Final = "the same, all calls traced"


class _Sink:
    """A receiver of OTLP that throws everything away."""

    def __init__(self, response: type) -> None:
        self._response = response

    async def Export(self, _: Any, __: Any) -> Any:  # noqa: ANN401, N802 - generated types have no annotations
        return self._response()


async def receive() -> tuple[grpc.aio.Server, str]:
    """Starts the receiver. Returns it and its endpoint."""
    server = grpc.aio.server()
    traces: Any = trace_service_pb2_grpc  # which has no types
    metrics: Any = metrics_service_pb2_grpc
    traces.add_TraceServiceServicer_to_server(_Sink(trace_service_pb2.ExportTraceServiceResponse), server)
    metrics.add_MetricsServiceServicer_to_server(_Sink(metrics_service_pb2.ExportMetricsServiceResponse), server)
    endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    return server, endpoint


def command(flags: Sequence[str], otlp: str) -> list[str]:
    """Returns the command line of a server."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        metrics = f"127.0.0.1:{free.getsockname()[1]}"
    given = [{"METRICS": metrics, "OTLP": otlp}.get(flag, flag) for flag in flags]
    program = [sys.executable, "-m", "flywheel_server", "--address", "127.0.0.1:0", "--engine", "scripted"]
    return [*program, "--script", json.dumps(SCRIPT), "--withdraw-window", "0", "--drain-timeout", "0", *given]


def environment(name: str) -> dict[str, str]:
    """Returns the environment variables of a server."""
    return {**os.environ, "OTEL_TRACES_SAMPLER": "parentbased_always_on"} if name == ALL_TRACED else {**os.environ}


async def unary(stub: Any, calls: int = CALLS) -> int:  # noqa: ANN401 - a stub of grpc.aio
    """Makes calls of one token. Returns how many."""

    async def caller() -> None:
        for _ in range(calls // CALLERS):
            await stub.GenerateAll(pb.GenerationRequest(text="x", max_tokens=1))

    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    return calls


async def deltas(stub: Any) -> int:  # noqa: ANN401 - as above
    """Reads streams that do not end in one step. Returns how many messages came."""

    async def read() -> int:
        return len([delta async for delta in stub.GenerateDeltas(pb.GenerationRequest(text="x", max_tokens=TOKENS))])

    return sum(await asyncio.gather(*(read() for _ in range(STREAMS))))


LOADS: Final[Mapping[str, tuple[Callable[[Any], Awaitable[int]], int]]] = {
    "call": (unary, TURNS),
    "delta": (deltas, TURNS // 2),
}
"""Each load, and how many turns of it a round has."""


async def cost(pid: int, load: Callable[[Any], Awaitable[int]], stub: Any) -> float:  # noqa: ANN401 - as above
    """Returns the server's CPU time for each call or delta, in µs."""
    await unary(stub, WARMING)
    begun = cpu_seconds(pid)
    count = await load(stub)
    return (cpu_seconds(pid) - begun) / count * 1e6


async def measure(rounds: int) -> None:
    """Measures, and prints a table."""
    receiver, otlp = await receive()
    costs: dict[tuple[str, str], list[float]] = {(name, load): [] for name in REPORTS for load in LOADS}
    for _ in range(rounds):
        for key, microseconds in (await measure_round(otlp)).items():
            costs[key].append(microseconds)
    await receiver.stop(0)
    print("| the server reports | µs of CPU for a unary call | ratio | µs for a delta | ratio |\n|---|---|---|---|---|")
    for name in REPORTS:
        cells = [name]
        for load in LOADS:
            pairs = zip(costs[name, load], costs["nothing", load], strict=True)
            ratios = sorted(one / nothing for one, nothing in pairs)
            cells.append(f"{statistics.median(costs[name, load]):.0f}")
            cells.append(f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})")
        print(f"| {' | '.join(cells)} |")


async def measure_round(otlp: str) -> Mapping[tuple[str, str], float]:
    """Starts all servers, and returns the CPU time of each for each call and delta, in µs."""
    costs: dict[tuple[str, str], float] = {}
    with ExitStack() as stack:
        names = random.sample(list(REPORTS), len(REPORTS))
        servers = {name: stack.enter_context(started(command(REPORTS[name], otlp), environment(name))) for name in names}
        channels = {name: grpc.aio.insecure_channel(address) for name, (_, address) in servers.items()}
        stubs = {name: generation_pb2_grpc.GenerationServiceStub(channel) for name, channel in channels.items()}
        for name in names:
            await unary(stubs[name])  # compiles and caches what the first calls of a process do
        for load, (run, turns) in LOADS.items():
            spent = dict.fromkeys(names, 0.0)
            for name in turns * names:
                spent[name] += await cost(servers[name][0], run, stubs[name]) / turns
            costs |= {(name, load): microseconds for name, microseconds in spent.items()}
        await asyncio.gather(*(channel.close() for channel in channels.values()))
    return costs


def main() -> None:
    """Measures, and prints a table of medians, with the least and the largest ratio of a round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    asyncio.run(measure(parser.parse_args().rounds))


if __name__ == "__main__":
    main()
