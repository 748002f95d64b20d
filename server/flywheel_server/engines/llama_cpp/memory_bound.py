"""Makes an allocation fail if the machine has too little memory for it.

By default, Linux grants memory that it does not have, and kills a process once the memory is used. If the allocation fails
instead, llama.cpp reports that like any other reason why it cannot load a model.
"""

import math
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from flywheel_server.system.cgroups import free_memory

MEMINFO: Final = Path("/proc/meminfo")
STATUS: Final = Path("/proc/self/status")
"""See proc(5). Systems that imitate Linux, such as WSL 1 and gVisor, may lack some lines of these files."""

DEFAULT_STACK_BYTES: Final = 8 * 2**20


@contextmanager
def bounded_memory(threads: int) -> Iterator[None]:
    """Limits what the process allocates within the context to the memory that is free when the context begins.

    Arguments:
        threads: How many threads start within the context. Their stacks are allowed on top, because threads hardly use them.
    """
    max_bytes = _max_bytes()
    if max_bytes == math.inf:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = int(max_bytes) + threads * _stack_bytes()
    # RLIM_INFINITY is negative.
    limits = [each for each in (limit, soft, hard) if each != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _max_bytes() -> float:
    """Returns the bytes that the process has allocated plus those that are free; infinity if the system does not tell."""
    try:
        machine = _kibibytes(MEMINFO)
        free = (machine["MemAvailable"] + machine["SwapFree"]) * 1024
        # VmData is what RLIMIT_DATA counts; see getrlimit(2).
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
