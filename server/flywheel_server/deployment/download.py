"""Downloads weights from the Hugging Face hub into a directory that outlives the process, unless they are there."""

import errno
import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import disable_progress_bars

from flywheel_server.deployment.weights import Weights

REPORT_INTERVAL: Final = 5.0
"""Seconds between two lines about the progress of a download."""

SHA256_DIGITS: Final = 64
NO_SPACE_ERRNOS: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DownloadError(RuntimeError):
    """The weights could not be downloaded. The message says why, and what to do."""


def fetch(weights: Weights, directory: Path, report: Callable[[str], None]) -> Path:
    """Returns the path of the weights' file, which is downloaded if the directory does not have it.

    The file moves to its path only after its size and, if the hub has one, its SHA-256 have been checked. So an existing file
    is neither downloaded nor checked again. huggingface_hub resumes connections that stall or break, within its limits. A
    failed download leaves no files behind. Concurrent downloads of the same file do not interfere.

    Arguments:
        weights: What to download.
        directory: The directory, which is created if it does not exist.
        report: Receives a line of text about the progress, every few seconds.

    Raises:
        DownloadError: The hub does not give the file, its size or content is wrong, or the disk is full.
    """
    path = weights.path(directory)
    if path.exists():
        report(f"{weights.name}: is there, {_gb(path.stat().st_size)}")
        return path
    try:
        _download(weights, path, report)
    except DownloadError:
        raise
    except Exception as error:
        raise DownloadError(f"{weights.name}: {_reason(error, weights, directory)}") from error
    return path


def _download(weights: Weights, path: Path, report: Callable[[str], None]) -> None:
    metadata = get_hf_file_metadata(hf_hub_url(weights.repository, weights.file, revision=weights.revision))
    if metadata.size is not None:
        _check_size(weights, metadata.size)
    path.parent.mkdir(parents=True, exist_ok=True)
    disable_progress_bars()
    with TemporaryDirectory(prefix=".incoming-", dir=path.parent) as incoming:
        with _progress(weights, Path(incoming), metadata.size or weights.size_bytes, report):
            # The commit of the metadata: the newest commit may be another one by now.
            arrived = Path(hf_hub_download(weights.repository, weights.file, revision=metadata.commit_hash, local_dir=incoming))
        _check_size(weights, arrived.stat().st_size)
        if metadata.etag and len(metadata.etag) == SHA256_DIGITS:
            report(f"{weights.name}: checking the SHA-256")
            with arrived.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            if sha256 != metadata.etag:
                raise DownloadError(f"{weights.name}: arrived with SHA-256 {sha256}, not {metadata.etag}. Run it again.")
        arrived.replace(path)


def _check_size(weights: Weights, size: int) -> None:
    if size > weights.size_bytes:
        raise DownloadError(
            f"{weights.name}: {weights.file} has {size} bytes on the hub, and the catalogue says at most {weights.size_bytes}, "
            "from which it was computed that it fits the GPU. Correct the catalogue, or pin the revision that it describes."
        )


@contextmanager
def _progress(weights: Weights, incoming: Path, total: int, report: Callable[[str], None]) -> Iterator[None]:
    """Reports the progress of the download until the context ends.

    Measures it on the disk, because only later versions of huggingface_hub take a progress bar, and what they count differs
    between its download methods.
    """
    started = time.monotonic()
    done = threading.Event()

    def watch() -> None:
        while not done.wait(REPORT_INTERVAL):
            arrived = _bytes_on_disk(incoming)
            speed = arrived / (time.monotonic() - started)
            left = f"{(total - arrived) / speed:.0f} s left" if speed else "waiting"
            report(f"{weights.name}: {arrived / 1e9:.2f} of {_gb(total)}, {speed / 1e6:.0f} MB/s, {left}")

    report(f"{weights.name}: downloading {_gb(total)}")
    watcher = threading.Thread(target=watch, name="download-progress", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
    report(f"{weights.name}: downloaded in {time.monotonic() - started:.0f} s")


def _bytes_on_disk(directory: Path) -> int:
    """Returns the bytes on the disk of the file that is being downloaded into the directory."""
    for path in directory.rglob("*.incomplete"):
        with suppress(FileNotFoundError):  # it was moved to its path just now
            stat = path.stat()
            # If it is written in several places at a time, its length is full early, but it has holes.
            return min(stat.st_size, stat.st_blocks * 512) or stat.st_size
    return 0


def _reason(error: Exception, weights: Weights, directory: Path) -> str:
    details = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in NO_SPACE_ERRNOS:
        return f"no room in {directory} for {_gb(weights.size_bytes)}. ({details})"
    revision = f"{weights.repository}, revision {weights.revision or 'main'}"
    # The first match counts: GatedRepoError is a RepositoryNotFoundError, and all of them but the last are HfHubHTTPError.
    reasons: tuple[tuple[type[Exception], str], ...] = (
        (GatedRepoError, f"{weights.repository} is gated. Accept its terms on the hub, and set HF_TOKEN to a token of yours."),
        (RepositoryNotFoundError, f"the hub has no {weights.repository}, or hides it. If it is private, set HF_TOKEN."),
        (RevisionNotFoundError, f"the hub has no {revision}."),
        (RemoteEntryNotFoundError, f"the hub has no {weights.file} in {revision}."),
        (
            HfHubHTTPError,
            f"the hub answered with an error. If it is 401 or 403, see to HF_TOKEN; else try again later. ({details})",
        ),
        (Exception, f"the hub cannot be reached, or was lost. Run it again. ({type(error).__name__}: {details})"),
    )
    return next(reason for kind, reason in reasons if isinstance(error, kind))


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
