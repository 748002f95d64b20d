"""Tells errors of the environment from those of the code that raised them: nothing is broken, something has run out.

That is descriptors, memory, threads, or space on a disk. All of them come back without anybody mending anything.
"""

import errno
from typing import Final

_ERRNOS: Final = frozenset(
    {
        errno.EAGAIN,  # threads and processes, as fork(2) and pthread_create(3) say it
        errno.EDQUOT,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOBUFS,
        errno.ENOMEM,
        errno.ENOSPC,
    }
)
_NO_THREAD: Final = "can't start new thread"
"""The text of the `RuntimeError` that Python raises in place of the system's error."""


def is_shortage(error: BaseException) -> bool:
    """Return whether the error, or an error that led to it, says that the process or the machine has run out of something."""
    return shortage_in(error) is not None


def shortage_in(error: BaseException) -> BaseException | None:
    """Return the error of the environment that led to `error`, as a traceback would show it, or None if there is none."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        if _says_so(link):
            return link
        seen.add(id(link))
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return None


def _says_so(error: BaseException) -> bool:
    match error:
        case MemoryError():
            return True
        case OSError():
            return error.errno in _ERRNOS
        case RuntimeError():
            return str(error) == _NO_THREAD
        case _:
            return False
