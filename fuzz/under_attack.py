"""Measures what an attack on a server costs other clients, and whether the server survives and recovers."""

import asyncio
import time
from dataclasses import dataclass
from typing import Final, Protocol

from fuzz.http2 import Tally
from fuzz.probe import CALL_INTERVAL, Observation, Served, ServerProcess, elsewhere, observing, ratio

RECOVERY: Final = 10.0
"""The seconds within which the server must recover after the attack."""
KEY: Final = "0123456789abcdef"
"""The key of the well-behaved client, if the server has keys."""
COST_HEADER: Final = (
    "answers, the most frequent first",
    "served, connected",
    "served, new",
    "median",
    "p99",
    "MiB before, most, after",
    "fds before, most, after",
    "lines logged",
)


class Attack(Protocol):
    """An attack. It can be pickled, because it runs in another process."""

    @property
    def name(self) -> str:
        """The name of the attack in the table."""

    async def run(self, host: str, port: int, seconds: float) -> Tally:
        """Attacks for so many seconds. Returns what was sent and what came back."""


@dataclass(frozen=True)
class Cost:
    """The cost of an attack.

    Attributes:
        tally: What the attackers sent, and what came back.
        seconds: How long they attacked.
        quiet: The observation of the server before the attack.
        attacked: The observation of the server during the attack.
        resident: The memory of the server after the attack, in MiB.
        descriptors: The file descriptors of the server after the attack.
        logged: The lines that the server wrote to its log.
    """

    tally: Tally
    seconds: float
    quiet: Observation
    attacked: Observation
    resident: float
    descriptors: int
    logged: int

    def cells(self, *answers: str) -> list[str]:
        """Returns the cells of a row under `COST_HEADER`, with those answers that begin with one of these words, or all."""
        counts = [
            f"{answer} x{count}" for answer, count in self.tally.answers.most_common() if answer.startswith(answers or "")
        ]
        return [
            ", ".join(counts) or "none",
            str(self.attacked.held),
            str(self.attacked.new),
            ratio(self.attacked.held.median(), self.quiet.held.median()),
            ratio(self.attacked.held.p99(), self.quiet.held.p99()),
            f"{self.quiet.resident:.0f}, {self.attacked.resident:.0f}, {self.resident:.0f}",
            f"{self.quiet.descriptors}, {self.attacked.descriptors}, {self.descriptors}",
            str(self.logged),
        ]


class NotSurvivedError(Exception):
    """The server has ended, or has not recovered."""


async def cost_of(
    attack: Attack, server: ServerProcess, seconds: float, *, quiet_seconds: float, call_interval: float = CALL_INTERVAL
) -> Cost:
    """Attacks the server, and returns the cost. Raises `NotSurvivedError`.

    Arguments:
        attack: What the attackers do, in a process of their own.
        server: The server, which has just started.
        seconds: How long they attack.
        quiet_seconds: How long the server is observed before the attack.
        call_interval: The seconds between two calls of the well-behaved client.
    """
    for _ in range(2):  # the first warms up
        async with observing(server, call_interval) as quiet:
            await asyncio.sleep(quiet_seconds)
    async with observing(server, call_interval) as attacked:
        start = time.perf_counter()
        tally = await elsewhere(_run, attack, server.address, seconds)
        lasted = time.perf_counter() - start
    if not server.is_alive():
        raise NotSurvivedError(f"the server ended with {server.process.returncode}")
    await _recovered(server, quiet.descriptors, call_interval)
    return Cost(tally, lasted, quiet, attacked, server.resident(), server.descriptors(), server.logged())


def _run(attack: Attack, address: str, seconds: float) -> Tally:
    host, _, port = address.rpartition(":")
    return asyncio.run(attack.run(host, int(port), seconds))


async def _recovered(server: ServerProcess, descriptors: int, call_interval: float) -> None:
    """Returns when the server is as it was before the attack. Raises `NotSurvivedError` if that takes too long."""
    served = Served()
    deadline = time.monotonic() + RECOVERY
    while time.monotonic() < deadline:
        async with observing(server, call_interval) as observation:
            await asyncio.sleep(max(0.5, call_interval / 2))
        served = observation.new
        if served.seconds and not served.failures and server.descriptors() <= descriptors:
            return
    raise NotSurvivedError(f"after {RECOVERY:.0f} s, {served} calls are served, with {server.descriptors()} file descriptors")
