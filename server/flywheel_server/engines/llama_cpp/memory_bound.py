"""An allocation that the machine has no room for fails, rather than end this process or others.

Linux grants memory that it does not have, and ends a process once the memory is used. An allocation that fails at once is
reported by llama.cpp as any other reason why a model cannot be loaded.
"""

import math
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from flywheel_server.system.cgroups import free_memory

MEMINFO: Final = Path("/proc/meminfo")
STATUS: Final = Path("/proc/self/status")
"""See proc(5). What passes for Linux, such as WSL 1 and gVisor, may lack some of their lines."""

DEFAULT_STACK_BYTES: Final = 8 * 2**20


@contextmanager
def bounded_memory(threads: int) -> Iterator[None]:
    """Let the process allocate no more within the context than is free when the context begins.

    Arguments:
        threads: How many threads start meanwhile. Their stacks are allocated, but hardly used, so they do not count.
    """
    allowed = _allowed() if sys.platform == "linux" else math.inf
    if allowed == math.inf:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    bound = int(allowed) + threads * _stack_bytes()
    # RLIM_INFINITY is negative.
    bounds = [each for each in (bound, soft, hard) if each != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min(bounds), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _allowed() -> float:
    """Return how many bytes the process has allocated and may allocate; infinity if the kernel does not tell."""
    try:
        machine = _kibibytes(MEMINFO)
        free = (machine["MemAvailable"] + machine["SwapFree"]) * 1024
        # What counts towards RLIMIT_DATA: see getrlimit(2).
        allocated = _kibibytes(STATUS)["VmData"] * 1024
    except (OSError, KeyError):
        return math.inf
    return allocated + min(free, free_memory())


def _kibibytes(file: Path) -> dict[str, int]:
    lines = (line.split() for line in file.read_text().splitlines() if line.endswith(" kB"))
    return {name.removesuffix(":"): int(number) for name, number, _ in lines}


def _stack_bytes() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_STACK)
    return DEFAULT_STACK_BYTES if soft == resource.RLIM_INFINITY else soft
