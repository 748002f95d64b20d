"""Whether the server goes on serving others while it is attacked over HTTP/2: `python -m fuzz.abuse`.

Each attack has a new server. A client that is connected already and clients that connect anew call it before and meanwhile; how
much slower their calls become is the ratio of the two, from one run. The attackers have a process of their own, with a lower
priority than server and probe: on one machine, their computing is no part of the attack.
"""

import argparse
import asyncio
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Final

from fuzz.attacks import ATTACKS, Attack
from fuzz.http2 import Tally
from fuzz.probe import Served, ServerProcess, flywheel_server, observing, print_row, ratio

QUIET: Final = 2.0
"""Seconds in which the server is observed before the attack."""
RECOVERY: Final = 10.0
"""Seconds after the attack in which the server must be as it was before."""
KEY: Final = "0123456789abcdef"
"""The key of the server and of who behaves, where attackers have none."""
ANSWERS: Final = ("GOAWAY", "RST_STREAM", "closed", "refused")
HEADER: Final = (
    "attack",
    "frames/s",
    "connections",
    "answers, the most frequent first",
    "served, connected",
    "served, new",
    "median",
    "p99",
    "MiB before, most, after",
    "fds before, most, after",
    "lines logged",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Attacks, and prints a table; exits with 1 where a server did not survive or does not recover."""
    names = [attack.name for attack in ATTACKS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="how long each attack lasts (default: 5)")
    parser.add_argument("--attack", action="append", choices=names, help="only this one; may be repeated")
    parser.add_argument("server_arguments", nargs="*", help="arguments of flywheel-server, after --")
    options = parser.parse_args(arguments)
    problems = []
    print_row(HEADER)
    print_row(["---"] * len(HEADER))
    for name in options.attack or names:
        api_key = KEY if _named(name).is_by_strangers else ""
        with flywheel_server("--engine", "scripted", *options.server_arguments, api_key=api_key) as server:
            row, problem = asyncio.run(_attack(server, name, options.seconds))
        print_row(row)
        if problem:
            problems.append(f"{name}: {problem}")
    if problems:
        sys.exit("\n".join(problems))


async def _attack(server: ServerProcess, name: str, seconds: float) -> tuple[list[str], str]:
    """Attacks the server; returns the row of the table, and what is wrong with the server afterwards."""
    for _ in range(2):  # the first warms up
        async with observing(server) as quiet:
            await asyncio.sleep(QUIET)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), os.nice, (10,)) as attackers:
        async with observing(server) as attacked:
            running = asyncio.get_running_loop()
            start = time.perf_counter()
            tally = await running.run_in_executor(attackers, _run, name, server.address, seconds)
            lasted = time.perf_counter() - start
    if not server.is_alive():
        return [name, *[""] * (len(HEADER) - 1)], f"the server ended with {server.process.returncode}"
    problem = await _not_recovered(server, quiet.descriptors)
    answers = [f"{answer} x{count}" for answer, count in tally.answers.most_common() if answer.startswith(ANSWERS)]
    return [
        name,
        f"{tally.sent / lasted:,.0f}",
        str(tally.connections),
        ", ".join(answers) or "none",
        str(attacked.held),
        str(attacked.new),
        ratio(attacked.held.median(), quiet.held.median()),
        ratio(attacked.held.p99(), quiet.held.p99()),
        f"{quiet.resident:.0f}, {attacked.resident:.0f}, {server.resident():.0f}",
        f"{quiet.descriptors}, {attacked.descriptors}, {server.descriptors()}",
        str(server.logged()),
    ], problem


def _run(name: str, address: str, seconds: float) -> Tally:
    host, _, port = address.rpartition(":")
    return asyncio.run(_named(name).run(host, int(port), seconds))


def _named(name: str) -> Attack:
    return next(attack for attack in ATTACKS if attack.name == name)


async def _not_recovered(server: ServerProcess, descriptors: int) -> str:
    """Returns in which way the server is not as before the attack, when it has had the time to recover."""
    served = Served()
    deadline = time.monotonic() + RECOVERY
    while time.monotonic() < deadline:
        async with observing(server) as observation:
            await asyncio.sleep(0.5)
        served = observation.new
        if served.seconds and not served.failures and server.descriptors() <= descriptors:
            return ""
    return f"after {RECOVERY:.0f} s, {served} calls are served, with {server.descriptors()} file descriptors"


if __name__ == "__main__":
    main()
