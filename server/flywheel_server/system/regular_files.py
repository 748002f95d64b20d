"""Reads whole files."""

import errno
import stat
from pathlib import Path


def content_of(file: Path) -> bytes:
    """Returns the content of a file. Raises `OSError` if it is unreadable, or not a regular file: a pipe may never end."""
    mode = file.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, "It is not a regular file")
    return file.read_bytes()
