"""Runs scenarios on peers: one server at a time, each in a process of its own, measured from outside."""

import json
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from os import environ
from typing import Any, Final

from benchmarks.building import LOAD_CLIENT
from benchmarks.peers import KEY, Peer
from benchmarks.processes import PeakMemory, cpu_seconds, resident_bytes
from benchmarks.runs import Interruption, Run, interruption
from benchmarks.scenarios import LONG_PROMPT, REPEATING_PROMPT, TEXT, Scenario
from benchmarks.serving import started

CONNECTIONS: Final = 8
"""HTTP/2 connections that the streams share. With HTTP/1.1, each stream has a connection of its own."""

MODEL_CALL_TIMEOUT: Final = 20.0
"""Seconds that a call to a model may take."""

UNDISTURBED_SECONDS: Final = 3.0
"""Seconds for which streams run before a long prompt interrupts them."""

Arguments = dict[str, Any]
"""Flags of the load client and their values."""

BeginLoad = Callable[[], dict[str, Any]]
"""Starts the load of a load client, waits for its end, and returns its report."""


def run_rounds(peers: Sequence[Peer], scenarios: Sequence[Scenario], *, rounds: int, seconds: float) -> Iterator[Run]:
    """Runs every scenario on every peer once in each round, and yields each run when it ends.

    The peers of a scenario run one after the other, so that a slow minute of the machine affects all of them. Each round begins
    with another peer.
    """
    for number in range(rounds):
        for scenario in scenarios:
            for peer in rotated([each for each in peers if each.takes_part(scenario)], number):
                yield run_once(peer, scenario, number, seconds * scenario.longer)


def rotated(peers: Sequence[Peer], number: int) -> list[Peer]:
    """Returns the peers in the order of round `number`."""
    start = number % max(len(peers), 1)
    return [*peers[start:], *peers[:start]]


def run_once(peer: Peer, scenario: Scenario, number: int, seconds: float) -> Run:
    """Starts the peer, runs the load, and stops the peer."""
    start = time.monotonic()
    with started(peer.start_command(scenario), {**environ, **peer.environment}) as (pid, address):
        arguments = _arguments(peer, scenario, address, seconds)
        with load_client(arguments) as begin:
            start_seconds = time.monotonic() - start
            base, cpu = resident_bytes(pid), cpu_seconds(pid)
            with PeakMemory(pid) as memory:
                if scenario.interrupted:
                    load, interrupted = _interrupted(begin, arguments)
                else:
                    load, interrupted = begin(), None
                cpu = cpu_seconds(pid) - cpu
        return Run(peer.name, scenario.name, number, load, start_seconds, cpu, base, memory.peak, interrupted)


def _arguments(peer: Peer, scenario: Scenario, address: str, seconds: float) -> Arguments:
    """Returns the flags of the load client."""
    end = scenario.stagger + seconds
    arguments: Arguments = {
        "address": address,
        "protocol": peer.protocol,
        "key": KEY,
        "streams": scenario.streams,
        "connections": CONNECTIONS,
        "calls": 1 if scenario.kind == "paced" else 0,
        "unary": json.dumps(scenario.kind == "unary"),
        "seconds": end,
        "stagger": scenario.stagger,
        "max-tokens": scenario.tokens(seconds),
        # Ends the calls of a server that is much too slow.
        "deadline": 2 + 1.5 * end,
        "trace": json.dumps(scenario.interrupted),
    }
    if scenario.kind == "model":
        return arguments | {"prompt": REPEATING_PROMPT, "temperature": 0, "deadline": MODEL_CALL_TIMEOUT}
    return arguments | {"text": TEXT}


def _interrupted(begin: BeginLoad, arguments: Arguments) -> tuple[dict[str, Any], Interruption | None]:
    """Runs the load while one more caller sends a long prompt. The interruption is None if that call fails."""
    prompt_arguments = {"streams": 1, "calls": 1, "max-tokens": 1, "prompt": LONG_PROMPT, "stagger": 0, "trace": "false"}
    with load_client(arguments | prompt_arguments) as begin_prompt, ThreadPoolExecutor() as executor:
        streams = executor.submit(begin)
        time.sleep(UNDISTURBED_SECONDS)
        prompt = begin_prompt()
        load = streams.result()
    arrivals = load.pop("streams")
    if prompt["first_message_ms"] is None:
        return load, None
    sent = datetime.fromisoformat(prompt["began"]).timestamp()
    read = sent + prompt["first_message_ms"]["p50"] / 1000
    # Without the very beginning, in which the prompts of the streams themselves are read.
    return load, interruption(arrivals, sent - UNDISTURBED_SECONDS / 2, sent, read)


@contextmanager
def load_client(arguments: Arguments) -> Iterator[BeginLoad]:
    """Connects a load client for the length of the context, and gives the function that starts its load."""
    command = [str(LOAD_CLIENT), *(f"-{name}={value}" for name, value in arguments.items())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None  # noqa: S101 - for the type checker
        assert process.stdout is not None  # noqa: S101
        if process.stdout.readline() != "ready\n":
            raise RuntimeError("the load client could not call the server")
        stdin, stdout = process.stdin, process.stdout

        def begin() -> dict[str, Any]:
            stdin.write("\n")
            stdin.flush()
            report: dict[str, Any] = json.loads(stdout.readline())
            return report

        try:
            yield begin
        finally:
            process.terminate()
