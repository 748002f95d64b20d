"""An allocation that the machine has no room for fails, rather than end this process or others.

Linux grants memory that it does not have, and ends a process once the memory is used. An allocation that fails at once is
reported by llama.cpp as any other reason why a model cannot be loaded.
"""

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from flywheel_server.cgroups import free_memory

DEFAULT_STACK_BYTES: Final = 8 * 2**20


@contextmanager
def bounded_memory(threads: int) -> Iterator[None]:
    """Let the process allocate no more within the context than is free when the context begins.

    Arguments:
        threads: How many threads start meanwhile. Their stacks are allocated, but hardly used, so they do not count.
    """
    free = min(_free_on_machine(), free_memory()) if sys.platform == "linux" else float("inf")
    if free == float("inf"):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    bound = _allocated() + int(free) + threads * _stack_bytes()
    # RLIM_INFINITY is negative.
    bounds = [each for each in (bound, soft, hard) if each != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min(bounds), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _free_on_machine() -> float:
    return sum(_kibibytes(Path("/proc/meminfo"), name) for name in ("MemAvailable", "SwapFree")) * 1024


def _allocated() -> int:
    """Return how much counts towards RLIMIT_DATA: see getrlimit(2)."""
    return _kibibytes(Path("/proc/self/status"), "VmData") * 1024


def _kibibytes(file: Path, name: str) -> int:
    return next(int(line.split()[1]) for line in file.read_text().splitlines() if line.startswith(f"{name}:"))


def _stack_bytes() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_STACK)
    return DEFAULT_STACK_BYTES if soft == resource.RLIM_INFINITY else soft
