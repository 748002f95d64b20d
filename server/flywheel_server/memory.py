"""How much memory this process may use."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

_CGROUP_LIMITS: Final = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Where Linux tells the limit of a container: version 2 and version 1."""


def total_memory() -> int | None:
    """Return the bytes of memory of the machine, or of the container if it has a limit below that; None if nothing tells."""
    found: list[int] = []
    with suppress(OSError, ValueError, AttributeError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for limit in _CGROUP_LIMITS:
        # Without a limit, it says "max".
        with suppress(OSError, ValueError):
            found.append(int(limit.read_text()))
    return min(found, default=None)
