"""Files that are read again when they change, and that may be wrong for a while without harm."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import structlog

log = structlog.stdlib.get_logger(__name__)

Loaded = TypeVar("Loaded")


class Reloadable(Generic[Loaded]):
    """What some files hold. It may be used by several threads.

    Arguments:
        what: What they hold, for the log.
        files: Where they are.
        load: Reads them; raises `OSError` or `ValueError` where that cannot be, at once and from here for the first time.
    """

    def __init__(self, what: str, files: Sequence[Path], load: Callable[[], Loaded]) -> None:
        self._what = what
        self._files = files
        self._load = load
        self._lock = threading.Lock()
        self._problem: object = None
        # Taken before the files are read, here and below: what is written meanwhile is a change again.
        self._signature = self._look()
        self.first = load()

    def load_if_changed(self) -> Loaded | None:
        """Returns what the files hold if they have changed since; None where they have not, or cannot be loaded now."""
        with self._lock:
            signature = self._look()
            if signature == self._signature:
                return None
            try:
                loaded = self._load()
            except (OSError, ValueError) as error:
                # Tried again until it succeeds, as not all that is in the way is in the files; said once.
                problem = (signature, str(error))
                if problem != self._problem:
                    log.error(f"{self._what} not reloaded", error=str(error))  # noqa: TRY400 - the message says it
                self._problem = problem
                return None
            self._signature, self._problem = signature, None
            return loaded

    def _look(self) -> list[tuple[int, ...] | None]:
        return [_signature(file) for file in self._files]


def _signature(file: Path) -> tuple[int, ...] | None:
    """Returns what is another after any change of the file; None where it is out of reach."""
    try:
        status = file.stat()
    except OSError:
        return None
    # With the time of the inode's change, which programs that keep the other time cannot set.
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
