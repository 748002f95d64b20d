"""How many files and sockets the process may have open at a time."""

import sys
from contextlib import suppress
from pathlib import Path
from typing import Final

if sys.platform != "win32":
    import resource

MAX_LIMIT: Final = 2**20
"""The limit that is asked for where the system sets none. Linux grants no more by default (`fs.nr_open`)."""

MACOS_LIMIT: Final = 10240
"""`OPEN_MAX`: macOS grants no more to a process that asks for all, although it says that there is no limit."""

OPEN: Final = Path("/dev/fd")
"""The folder with an entry for each descriptor of the process that looks, on Linux and macOS."""

ASSUMED_IN_USE: Final = 32
"""Descriptors that are taken to be in use where that folder is missing: what a server has when it starts, and some more."""


def limit() -> int:
    """Return how many descriptors the process may have: the soft limit."""
    if sys.platform == "win32":
        return sys.maxsize
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def raise_limit() -> None:
    """Raise the soft limit to the hard one, as Go's runtime does; leave it if the system refuses.

    The soft limit is low for the sake of programs that use select(2), which fails on descriptors from 1024 on.
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
    """Return how many descriptors the process has; raise `OSError` if there is not even one more, to look with."""
    return len(list(OPEN.iterdir())) - 1 if OPEN.is_dir() else ASSUMED_IN_USE


def free() -> int:
    """Return how many more descriptors the process may have."""
    try:
        return max(0, limit() - in_use())
    except OSError:
        return 0
