"""Recognizes errors that mean a shortage: descriptors, memory, threads or disk space have run out, and no code is at fault.

A shortage may pass without a repair.
"""

import errno
from typing import Final

_ERRNOS: Final = frozenset(
    {
        errno.EAGAIN,  # threads and processes, from fork(2) and pthread_create(3)
        errno.EDQUOT,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOBUFS,
        errno.ENOMEM,
        errno.ENOSPC,
    }
)
_NO_THREAD: Final = "can't start new thread"
"""The text of the `RuntimeError` that Python raises if it cannot start a thread."""


def is_shortage(error: BaseException) -> bool:
    """Returns whether the error, or an error that led to it, is due to a shortage."""
    return shortage_in(error) is not None


def shortage_in(error: BaseException) -> BaseException | None:
    """Returns the first shortage error in the chain of errors that a traceback of `error` shows; None if there is none."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        if _is_shortage_itself(link):
            return link
        seen.add(id(link))
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return None


def _is_shortage_itself(error: BaseException) -> bool:
    return (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno in _ERRNOS)
        or (isinstance(error, RuntimeError) and str(error) == _NO_THREAD)
    )
