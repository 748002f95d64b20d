"""How many calls the server has, and how busy its engine is, as GetStats tells it."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from flywheel_server.engines.base import Engine, EngineStats
from flywheel_server.generations import Generations


@dataclass(frozen=True, slots=True)
class Counts:
    """How busy the server is: calls that the engine has begun, calls that it has not, and what the engine says of itself."""

    active: int
    queued: int
    engine: EngineStats


Count = Callable[[], Awaitable[Counts]]
"""Returns the counts of the server; raises `EngineError` if the engine does not say how busy it is."""


async def local_counts(engine: Engine, generations: Generations) -> Counts:
    """Returns the counts of this process; raises `EngineError`."""
    stats = await engine.stats()
    return Counts(generations.active, generations.queued, stats)
