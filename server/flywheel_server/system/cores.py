"""Counts the cores that this process may use. On a shared machine they may be fewer than it has."""

import math
import os
import sys

from flywheel_server.system.cgroups import cpu_quota


def usable_cores() -> int:
    """Returns how many cores this process can keep busy, at least 1.

    These are the cores of its affinity mask (`taskset`, `docker --cpuset-cpus`), or the whole cores of its CPU quota if they
    are fewer. A fraction of a core does not count: with a thread for it, the process would use up its quota early in each
    period, and would then be suspended for the rest, health checks included.
    """
    return max(1, math.floor(min(_affinity(), cpu_quota())))


def _affinity() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
