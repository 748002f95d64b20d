"""Memory that was freed goes back to the operating system, which glibc by itself does late or never.

glibc gives threads heaps of their own, as many as eight for each core, and keeps in each what was freed there. Long prompts are
tokenized on one thread of llama.cpp after the other, and each would leave up to 150 MiB in another heap. Other C libraries have
no such functions, and these do nothing there.
"""

import ctypes
import sys
from contextlib import suppress
from typing import Final

MAX_HEAPS: Final = 2

_M_ARENA_MAX: Final = -8
"""The number of that parameter in glibc's malloc.h."""


def limit_heaps() -> None:
    """Has all threads share `MAX_HEAPS` heaps. A heap that there is stays, so this comes before most threads start."""
    if sys.platform == "linux":
        with suppress(AttributeError):
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, MAX_HEAPS)


def release_freed() -> None:
    """Gives back what was freed; after much was, for it looks at all heaps. May be called from any thread."""
    if sys.platform == "linux":
        with suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
