"""Sends 100,000 messages that are random or nearly right to every method of a real server: `python -m fuzz.wire`.

Each answer must be the one that the contract has for these bytes, and a well-behaved client is served meanwhile; how much
slower its calls become is the ratio to a quiet time of the same run.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, Final

import grpc
import grpc.aio
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.errors import MalformedRequestError
from flywheel_server.messages import GenerationRequest, InvalidRequestError
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo
from google.rpc.status_pb2 import Status

from fuzz.http2 import SERVICE
from fuzz.probe import ServerProcess, flywheel_server, observing, print_row, ratio
from fuzz.targets import LIMITS, SEEDS, verdict

GENERATING: Final = ("Generate", "GenerateDeltas", "GenerateAll")
OTHERS: Final = {"GetModel": pb.GetModelRequest, "GetStats": pb.GetStatsRequest}
CONCURRENCY: Final = 32
POOL: Final = 1000
POOL_BYTES: Final = 1000
QUIET: Final = 5.0
"""Seconds in which the server is observed before."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Sends the messages, and prints two tables; exits with 1 where an answer is none of the contract's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=100_000, help="how many are sent (default: 100000)")
    parser.add_argument("--seed", type=int, default=1, help="which ones: the same for the same number (default: 1)")
    parser.add_argument("server_arguments", nargs="*", help="arguments of flywheel-server, after --")
    options = parser.parse_args(arguments)
    limits = ["--script", json.dumps({"context_tokens": LIMITS.context_tokens}), "--max-text-bytes", str(LIMITS.max_text_bytes)]
    with flywheel_server("--engine", "scripted", *limits, *options.server_arguments) as server:
        unexpected = asyncio.run(_measure(server, options.messages, options.seed))
    if unexpected:
        sys.exit("not as the contract has it:\n" + "\n".join(unexpected))


async def _measure(server: ServerProcess, messages: int, seed: int) -> list[str]:
    for _ in range(2):  # the first warms up
        async with observing(server) as quiet:
            await asyncio.sleep(QUIET)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), os.nice, (10,)) as senders:
        async with observing(server) as fuzzed:
            start = time.perf_counter()
            sending = asyncio.get_running_loop().run_in_executor(senders, _run, server.address, messages, seed)
            statuses, unexpected = await sending
            lasted = time.perf_counter() - start
    if not server.is_alive():
        unexpected.append(f"the server ended with {server.process.returncode}")
    async with observing(server) as after:
        await asyncio.sleep(QUIET)
    codes = sorted({code for _, code in statuses})
    print_row(["method", *codes])
    print_row(["---"] * (1 + len(codes)))
    for method in (*GENERATING, *OTHERS):
        print_row([method, *(f"{statuses[method, code]:,}" for code in codes)])
    print()
    for name, figure in {
        "with random messages": "figure",
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
    """Sends so many messages; returns how often each method answered with which status, and which answers are wrong."""
    rng = random.Random(seed)
    statuses: Counter[tuple[str, str]] = Counter()
    unexpected: list[str] = []
    # Requests, to be mutated on.
    pool = list(SEEDS["request"])
    left = iter(range(messages))

    async def sender(channel: grpc.aio.Channel) -> None:
        for _ in left:
            method = rng.choice((*GENERATING, *GENERATING, *OTHERS))
            data = mutated(rng, pool)
            answer = await _answer(channel, method, data, _metadata(rng))
            statuses[method, answer.code.name] += 1
            if not answer.is_for(method, data):
                unexpected.append(f"{method} {data.hex()}: {answer}")

    async with grpc.aio.insecure_channel(address) as channel:
        await asyncio.gather(*(sender(channel) for _ in range(CONCURRENCY)))
    return statuses, unexpected


def mutated(rng: random.Random, pool: list[bytes]) -> bytes:
    """Returns bytes that are random, or one of the pool with a few changes; valid requests among them join the pool."""
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
    if len(pool) < POOL and len(data) < POOL_BYTES and isinstance(verdict(changed), GenerationRequest):
        pool.append(changed)
    return changed


def _metadata(rng: random.Random) -> tuple[tuple[str, str | bytes], ...]:
    """Returns metadata that are random, as far as gRPC's client sends them."""
    text = "".join(chr(rng.randrange(0x20, 0x7F)) for _ in range(rng.randrange(200)))
    entries = (("x-request-id", text), ("authorization", text), ("x-other", text), ("x-other-bin", rng.randbytes(50)))
    return tuple(entry for entry in entries if rng.random() < 0.2)


class _Answer:
    """How a call ended."""

    def __init__(self, code: grpc.StatusCode, details: bytes, request_ids: int) -> None:
        self.code = code
        self._status = Status.FromString(details)
        self._request_ids = request_ids

    def is_for(self, method: str, data: bytes) -> bool:
        """Whether it is the one that the contract has for a request of these bytes."""
        if self._request_ids != 1:
            return False
        found = verdict(data, OTHERS.get(method, pb.GenerationRequest))
        if isinstance(found, MalformedRequestError):
            return self._is_invalid() and self._reason() == "MALFORMED_REQUEST"
        if isinstance(found, InvalidRequestError):
            violations = [(violation.field, violation.description) for violation in found.violations]
            return self._is_invalid() and self._violations() == violations
        # Which prompts are too long the engine says, in tokens of its own.
        return self.code is grpc.StatusCode.OK or (self._is_invalid() and len(self._violations()) == 1)

    def _is_invalid(self) -> bool:
        return self.code is grpc.StatusCode.INVALID_ARGUMENT and self._status.code == self.code.value[0]

    def _reason(self) -> str:
        info = ErrorInfo()
        return next((info.reason for detail in self._status.details if detail.Unpack(info)), "")

    def _violations(self) -> list[tuple[str, str]]:
        bad = BadRequest()
        found = next((bad.field_violations for detail in self._status.details if detail.Unpack(bad)), ())
        return [(violation.field, violation.description) for violation in found]

    def __str__(self) -> str:
        return f"{self.code.name}, {self._request_ids} request ids, {self._status}"


async def _answer(channel: grpc.aio.Channel, method: str, data: bytes, metadata: Any) -> _Answer:  # noqa: ANN401 - grpc's
    if method in ("Generate", "GenerateDeltas"):
        call: Any = channel.unary_stream(SERVICE + method, bytes, bytes)(data, metadata=metadata)
        reading = call.read
    else:
        call = channel.unary_unary(SERVICE + method, bytes, bytes)(data, metadata=metadata)
        reading = None
    try:
        if reading is None:
            await call
        else:
            while await reading() is not grpc.aio.EOF:
                pass
    except grpc.aio.AioRpcError:
        pass  # the code of the call says it too
    trailing = tuple(await call.trailing_metadata() or ())
    initial = tuple(await call.initial_metadata() or ())
    details = next((value for key, value in trailing if key == "grpc-status-details-bin"), b"")
    return _Answer(await call.code(), details, sum(key == "x-request-id" for key, _ in (*initial, *trailing)))


if __name__ == "__main__":
    main()
