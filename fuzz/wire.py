"""Sends messages that are random or nearly right to every method of real servers: `python -m fuzz.wire`.

The scripted engine gets 100,000 messages, and the embedded engine as many as it answers in about a minute. The contract must
allow each answer to its message. Meanwhile a well-behaved client is served. The ratio to a quiet time of the same run shows how
much slower its calls become.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import grpc.aio
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.messages import GenerationRequest
from google.protobuf.message import Message

from fuzz.answers import GENERATING, OTHERS, answer
from fuzz.probe import CALL_INTERVAL, ServerProcess, elsewhere, flywheel_server, observing, print_row, ratio
from fuzz.targets import LIMITS, SEEDS, verdict

CONCURRENCY: Final = 32
POOL: Final = 1000
POOL_BYTES: Final = 1000
QUIET: Final = 2.0
"""Seconds for which the server is observed before and after."""


@dataclass(frozen=True)
class Target:
    """A server to send messages to.

    Attributes:
        arguments: The arguments of `flywheel-server`, besides the limits of requests.
        messages: How many messages the server gets.
        call_interval: Seconds between two calls of the well-behaved client.
    """

    arguments: Sequence[str]
    messages: int
    call_interval: float


TARGETS: Final[Mapping[str, Target]] = {
    "scripted": Target(
        ("--script", json.dumps({"context_tokens": LIMITS.context_tokens})), messages=100_000, call_interval=CALL_INTERVAL
    ),
    "embedded": Target(
        # No call may be refused because the queue is full, and the senders need a core too.
        (f"--embedded-context={LIMITS.context_tokens}", "--embedded-threads=1", "--max-queued=1000"),
        messages=2000,
        call_interval=1.0,
    ),
}
"""The targets by the names of their engines."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Sends the messages, and prints two tables for each engine. Exits with 1 if the contract does not allow an answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", action="append", choices=list(TARGETS), help="only this one; may be repeated")
    parser.add_argument("--messages", type=int, help="how many are sent to each")
    parser.add_argument("--seed", type=int, default=1, help="which ones: the same for the same number (default: 1)")
    parser.add_argument("server_arguments", nargs="*", help="arguments of flywheel-server, after --")
    options = parser.parse_args(arguments)
    limits = ("--max-text-bytes", str(LIMITS.max_text_bytes), "--max-num-samples", str(LIMITS.max_num_samples))
    unexpected = []
    for engine in options.engine or TARGETS:
        target = TARGETS[engine]
        with flywheel_server("--engine", engine, *limits, *target.arguments, *options.server_arguments) as server:
            found = asyncio.run(_measure(server, engine, options.messages or target.messages, options.seed))
        unexpected += [f"{engine}: {problem}" for problem in found]
        print()
    if unexpected:
        sys.exit("not as the contract has it:\n" + "\n".join(unexpected))


async def _measure(server: ServerProcess, engine: str, messages: int, seed: int) -> list[str]:
    interval = TARGETS[engine].call_interval
    for _ in range(2):  # the first warms up
        async with observing(server, interval) as quiet:
            await asyncio.sleep(QUIET)
    async with observing(server, interval) as fuzzed:
        start = time.perf_counter()
        statuses, unexpected = await elsewhere(_run, server.address, messages, seed)
        lasted = time.perf_counter() - start
    if not server.is_alive():
        return [*unexpected, f"the server ended with {server.process.returncode}"]
    async with observing(server, interval) as after:
        await asyncio.sleep(QUIET)
    codes = sorted({code for _, code in statuses})
    print_row([f"method, {engine} engine", *codes])
    print_row(["---"] * (1 + len(codes)))
    for method in (*GENERATING, *OTHERS):
        print_row([method, *(f"{statuses[method, code]:,}" for code in codes)])
    print()
    for name, figure in {
        f"with random messages, {engine} engine": "figure",
        "---": "---",
        "messages": f"{messages:,} in {lasted:.0f} s",
        "answers that the contract does not have": str(len(unexpected)),
        "calls of a connected client that were served": str(fuzzed.held),
        "calls of clients that connect anew": str(fuzzed.new),
        "their latency, median and p99": f"{ratio(fuzzed.held.median(), quiet.held.median())} and "
        f"{ratio(fuzzed.held.p99(), quiet.held.p99())} of a quiet time",
        "MiB of memory before, most, after": f"{quiet.resident:.0f}, {fuzzed.resident:.0f}, {after.resident:.0f}",
        "file descriptors before, most, after": f"{quiet.descriptors}, {fuzzed.descriptors}, {after.descriptors}",
    }.items():
        print_row([name, figure])
    return unexpected


def _run(address: str, messages: int, seed: int) -> tuple[Counter[tuple[str, str]], list[str]]:
    return asyncio.run(send(address, messages, seed))


async def send(address: str, messages: int, seed: int) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Sends so many messages. Returns how often each method answered with each status, and the wrong answers."""
    rng = random.Random(seed)
    statuses: Counter[tuple[str, str]] = Counter()
    unexpected: list[str] = []
    # Requests for further mutation, by the name of their target.
    pools = {"request": list(SEEDS["request"]), "prompt": list(SEEDS["prompt"]), "empty": [b""]}
    left = iter(range(messages))

    async def sender(channel: grpc.aio.Channel) -> None:
        for _ in left:
            method = rng.choice((*GENERATING, *GENERATING, *OTHERS))
            kind = "prompt" if method == "Tokenize" else "empty" if method in OTHERS else "request"
            data = mutated(rng, pools[kind], OTHERS.get(method, pb.GenerationRequest))
            ended = await answer(channel, method, data, _metadata(rng))
            statuses[method, ended.code.name] += 1
            if not ended.is_for(method, data):
                unexpected.append(f"{method} {data.hex()}: {ended}")

    async with grpc.aio.insecure_channel(address) as channel:
        await asyncio.gather(*(sender(channel) for _ in range(CONCURRENCY)))
    return statuses, unexpected


def mutated(rng: random.Random, pool: list[bytes], kind: type[Message] = pb.GenerationRequest) -> bytes:
    """Returns random bytes, or a request of the pool with a few changes. A changed request that is valid joins the pool."""
    if rng.random() < 0.2:
        return rng.randbytes(rng.randrange(80))
    data = bytearray(rng.choice(pool))
    for _ in range(rng.randrange(4)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(5):
            case 0 if at < len(data):
                data[at] = rng.randrange(256)
            case 1 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 2:
                del data[at : at + rng.randrange(8)]
            case 3:
                data[at:at] = rng.randbytes(rng.randrange(8))
            case _:
                other = rng.choice(pool)
                data[at:at] = other[rng.randrange(len(other) + 1) :]
    changed = bytes(data)
    if len(pool) < POOL and len(data) < POOL_BYTES and isinstance(verdict(changed, kind), GenerationRequest):
        pool.append(changed)
    return changed


def _metadata(rng: random.Random) -> tuple[tuple[str, str | bytes], ...]:
    """Returns random metadata that the client of gRPC can send."""
    text = "".join(chr(rng.randrange(0x20, 0x7F)) for _ in range(rng.randrange(200)))
    entries = (("x-request-id", text), ("authorization", text), ("x-other", text), ("x-other-bin", rng.randbytes(50)))
    return tuple(entry for entry in entries if rng.random() < 0.2)


if __name__ == "__main__":
    main()
