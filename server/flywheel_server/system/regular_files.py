"""Files that are read as a whole."""

import errno
import stat
from pathlib import Path


def content_of(file: Path) -> bytes:
    """Return what a file holds. Raise `OSError` if that cannot be read, or is no file: a pipe may have no end, nor a device."""
    mode = file.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, "It is not a regular file")
    return file.read_bytes()
