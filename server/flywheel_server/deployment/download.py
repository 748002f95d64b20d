"""Fetches weights from the Hugging Face hub, once, into a directory that outlives the process."""

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
"""Seconds between two lines on the progress of a download."""

SHA256_DIGITS: Final = 64
NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DownloadError(RuntimeError):
    """The weights could not be fetched. The message says why, and what to do."""


def fetch(weights: Weights, directory: Path, report: Callable[[str], None]) -> Path:
    """Returns the file of the weights, after downloading it where the directory does not have it yet.

    The file is put in place when its size and, where the hub has one, its SHA-256 were right, so that one which is there is
    neither downloaded nor checked again. A connection that stalls or breaks is resumed, as far as huggingface_hub does it. A
    download that fails leaves nothing behind. Several at a time do not disturb each other.

    Arguments:
        weights: What to fetch.
        directory: Where to; made where it is missing.
        report: Is given a line of text about the progress, every few seconds.

    Raises:
        DownloadError: It is not to be had, its size or content is not the expected one, or there is no room for it.
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
            # Of the commit that was looked at: the newest may be another one by now.
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
    """Reports how the download goes while the context is open.

    It looks at the disk, because huggingface_hub takes a progress bar only in its later versions, and counts something else
    there for each way of downloading.
    """
    started = time.monotonic()
    done = threading.Event()

    def watch() -> None:
        while not done.wait(REPORT_INTERVAL):
            here = _on_disk(incoming)
            speed = here / (time.monotonic() - started)
            left = f"{(total - here) / speed:.0f} s left" if speed else "waiting"
            report(f"{weights.name}: {here / 1e9:.2f} of {_gb(total)}, {speed / 1e6:.0f} MB/s, {left}")

    report(f"{weights.name}: downloading {_gb(total)}")
    watcher = threading.Thread(target=watch, name="download-progress", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
    report(f"{weights.name}: downloaded in {time.monotonic() - started:.0f} s")


def _on_disk(directory: Path) -> int:
    """Returns the bytes that have arrived of the file which is downloaded into the directory."""
    for path in directory.rglob("*.incomplete"):
        with suppress(FileNotFoundError):  # it was moved into place just now
            stat = path.stat()
            # Where it is written in several places at a time, it has its full length early, and holes.
            return min(stat.st_size, stat.st_blocks * 512) or stat.st_size
    return 0


def _reason(error: Exception, weights: Weights, directory: Path) -> str:
    said = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return f"no room in {directory} for {_gb(weights.size_bytes)}. ({said})"
    where = f"{weights.repository}, revision {weights.revision or 'main'}"
    # The first that matches counts: a gated repository is a kind of missing one, and each is an HTTP error.
    reasons: tuple[tuple[type[Exception], str], ...] = (
        (GatedRepoError, f"{weights.repository} is gated. Accept its terms on the hub, and set HF_TOKEN to a token of yours."),
        (RepositoryNotFoundError, f"the hub has no {weights.repository}, or hides it. If it is private, set HF_TOKEN."),
        (RevisionNotFoundError, f"the hub has no {where}."),
        (RemoteEntryNotFoundError, f"the hub has no {weights.file} in {where}."),
        (
            HfHubHTTPError,
            f"the hub answered with an error. If it is 401 or 403, see to HF_TOKEN; else try again later. ({said})",
        ),
        (Exception, f"the hub cannot be reached, or was lost. Run it again. ({type(error).__name__}: {said})"),
    )
    return next(reason for kind, reason in reasons if isinstance(error, kind))


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
