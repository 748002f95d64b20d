"""Finds out how much memory this process may use."""

import os
from contextlib import suppress

from flywheel_server.system.cgroups import memory_limit


def total_memory() -> float:
    """Returns the bytes of memory of the machine, or of the container if it has less; infinity if unknown."""
    with suppress(OSError, ValueError, AttributeError):
        return min(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), memory_limit())
    return memory_limit()
