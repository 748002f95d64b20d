"""Returns freed memory to the operating system, which glibc by itself does late or never.

glibc gives threads separate heaps, up to eight for each core, and keeps freed memory in each. Long prompts are tokenized on
different threads of llama.cpp, and each would leave up to 150 MiB in another heap. Other C libraries lack the functions that
are used here; there, this module does nothing.
"""

import ctypes
import sys
from contextlib import suppress
from typing import Final

MAX_HEAPS: Final = 2
"""Heaps (arenas, in the terms of glibc) that all threads share."""

_M_ARENA_MAX: Final = -8
"""The number of the parameter M_ARENA_MAX in glibc's malloc.h."""


def limit_heaps() -> None:
    """Limits the process to `MAX_HEAPS` heaps. Existing heaps stay, so this is to be called before most threads start."""
    if sys.platform == "linux":
        with suppress(AttributeError):
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, MAX_HEAPS)


def release_freed() -> None:
    """Returns freed memory. It scans all heaps, so it is to be called only after much was freed. Thread-safe."""
    if sys.platform == "linux":
        with suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
