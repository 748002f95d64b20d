"""How many cores this process may use, which on a shared machine are fewer than there are."""

import math
import os
import sys

from flywheel_server.system.cgroups import cpu_quota


def usable_cores() -> int:
    """Return how many cores this process can keep busy, at least 1.

    These are the cores of its affinity mask (`taskset`, `docker --cpuset-cpus`), or the whole cores of its CPU quota if
    they are fewer. A part of a core does not count: with a thread for it, the process would use up its quota before the
    period is over, and then everything in the process stands still, health checks included.
    """
    return max(1, math.floor(min(_affinity(), cpu_quota())))


def _affinity() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
