"""Counts the calls of the server, and asks its engine how busy it is, for GetStats."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from flywheel_server.engines.base import Engine, EngineStats
from flywheel_server.generations import Generations


@dataclass(frozen=True, slots=True)
class Counts:
    """How busy the server is: calls that the engine has started (`active`) or not (`queued`), and the engine's own figures."""

    active: int
    queued: int
    engine: EngineStats


GetCounts = Callable[[], Awaitable[Counts]]
"""Returns the counts of the server; raises `EngineError` if the engine cannot say how busy it is."""


async def local_counts(engine: Engine, generations: Generations) -> Counts:
    """Returns the counts of this process; see `GetCounts`."""
    stats = await engine.stats()
    return Counts(generations.active, generations.queued, stats)
