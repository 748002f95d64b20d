"""Wall clocks that are wrong: of containers, and of client processes."""

import os
from collections.abc import Mapping
from pathlib import Path

WRONG_CLOCK = Path(__file__).parent / "wrong_clock"


def with_clock(environ: Mapping[str, str], offset: float) -> dict[str, str]:
    """Returns the environment of a process of Python whose wall clock is wrong by so many seconds."""
    if not offset:
        return dict(environ)
    path = (str(WRONG_CLOCK), environ.get("PYTHONPATH", ""))
    return {**environ, "WALL_CLOCK_OFFSET": str(offset), "PYTHONPATH": os.pathsep.join(filter(None, path))}


class Clocks:
    """By how much the clocks are wrong in the containers of an app, or of one of its functions."""

    def __init__(self) -> None:
        self._offsets: dict[str, float] = {}

    def set(self, name: str, offset: float) -> None:
        self._offsets[name] = offset

    def offset(self, app: str, tag: str) -> float:
        """Returns by how many seconds a container's clock is wrong."""
        return self._offsets.get(f"{app}/{tag.removesuffix('.*')}", self._offsets.get(app, 0.0))
