"""Reads and raises the limit of file descriptors: files and sockets that the process may have open at a time."""

import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final

if sys.platform != "win32":
    import resource

MAX_LIMIT: Final = 2**20
"""The limit that is requested if the hard limit is unlimited. By default, Linux grants no more (`fs.nr_open`)."""

MACOS_LIMIT: Final = 10240
"""`OPEN_MAX`: macOS grants no more, even if the hard limit is unlimited."""

DESCRIPTORS: Final = Path("/dev/fd")
"""The directory with an entry for each open descriptor of the process that reads it, on Linux and macOS."""

ASSUMED_IN_USE: Final = 32
"""Descriptors that are assumed to be open if that directory is missing: a few more than a server has when it starts."""


def limit() -> int:
    """Returns how many descriptors the process may have open: the soft limit."""
    if sys.platform == "win32":
        return sys.maxsize
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def raise_limit() -> None:
    """Raises the soft limit to the hard limit, as Go's runtime does, unless the system refuses.

    The soft limit is low because of programs that use select(2), which fails on descriptors from 1024 on.
    """
    if sys.platform == "win32":
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for highest in (MAX_LIMIT, MACOS_LIMIT):
        wanted = highest if hard == resource.RLIM_INFINITY else min(hard, highest)
        if wanted <= limit():
            return
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            return


def in_use() -> int:
    """Returns how many descriptors are open. Raises `OSError` if none is free, because counting needs one."""
    return len(list(DESCRIPTORS.iterdir())) - 1 if DESCRIPTORS.is_dir() else ASSUMED_IN_USE


def connections(port: int) -> int:
    """Returns how many TCP connections of this process have this local port; 0 on systems without `DESCRIPTORS`.

    Takes about 10 µs for each open descriptor. Runs on any thread.
    """
    entries = DESCRIPTORS.iterdir() if DESCRIPTORS.is_dir() else ()
    return sum(_is_connected(int(entry.name), port) for entry in entries)


def _is_connected(descriptor: int, port: int) -> bool:
    try:
        # Does not take the descriptor over, which another thread may close meanwhile.
        one = socket.socket(fileno=descriptor)
    except OSError:
        return False
    try:
        one.getpeername()
        return one.family in {socket.AF_INET, socket.AF_INET6} and one.getsockname()[1] == port
    except OSError:
        return False
    finally:
        one.detach()


def free() -> int:
    """Returns how many more descriptors the process may open."""
    with suppress(OSError):
        return max(0, limit() - in_use())
    return 0
