"""Reloads files when they change. While they are invalid, their last valid content stays in use."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import structlog

log = structlog.stdlib.get_logger(__name__)

Loaded = TypeVar("Loaded")


class Reloadable(Generic[Loaded]):
    """The content of some files, loaded now and again whenever they change. Thread-safe.

    Arguments:
        what: A name for the content, for the log.
        files: The files.
        load: Loads the files. May raise `OSError` or `ValueError`; the constructor passes that on.

    Attributes:
        first: The content as first loaded.
    """

    def __init__(self, what: str, files: Sequence[Path], load: Callable[[], Loaded]) -> None:
        self._what = what
        self._files = files
        self._load = load
        self._lock = threading.Lock()
        self._problem: object = None
        # Here and below, before the files are read: if they are written meanwhile, they are loaded again.
        self._loaded_signatures = self._signatures()
        self.first = load()

    def load_if_changed(self) -> Loaded | None:
        """Returns the content if the files have changed since it was last loaded; None if not, or if they cannot be loaded."""
        with self._lock:
            signatures = self._signatures()
            if signatures == self._loaded_signatures:
                return None
            try:
                loaded = self._load()
            except (OSError, ValueError) as error:
                # Tried again even if the files stay the same, because the cause may lie elsewhere. Logged once.
                problem = (signatures, str(error))
                if problem != self._problem:
                    log.error(f"{self._what} not reloaded", error=str(error))  # noqa: TRY400 - the message says it
                self._problem = problem
                return None
            self._loaded_signatures, self._problem = signatures, None
            return loaded

    def _signatures(self) -> list[tuple[int, ...] | None]:
        return [_signature(file) for file in self._files]


def _signature(file: Path) -> tuple[int, ...] | None:
    """Returns a value that differs after any change of the file; None if the file cannot be accessed."""
    try:
        status = file.stat()
    except OSError:
        return None
    # With the inode's change time, because some programs restore the modification time.
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
