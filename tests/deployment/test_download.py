"""Weights come over the wire, through the real huggingface_hub, from a small hub on the loopback interface."""

import errno
import hashlib
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from flywheel_server.deployment import download
from flywheel_server.deployment.download import DownloadError, fetch
from flywheel_server.deployment.weights import Weights
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# huggingface_hub writes pieces of 10 MiB, and what was written can be resumed.
CONTENT = bytes(range(256)) * (12 * 2**20 // 256)
PIECE = 10 * 2**20


def weights(**changes: object) -> Weights:
    values = {
        "name": "some-weights",
        "repository": "someone/Some-GGUF",
        "file": "some.gguf",
        "revision": COMMIT,
        "size_bytes": len(CONTENT),
        "layers": 1,
        "kv_heads": 1,
        "head_dim": 1,
    }
    return Weights(**{**values, **changes})  # type: ignore[arg-type]


@dataclass
class Hub:
    """A hub with one file, told how to misbehave."""

    content: bytes = CONTENT
    sha256: str = hashlib.sha256(CONTENT).hexdigest()
    status: int = 200
    error_code: str = ""
    token: str = ""
    stop_after: int | None = None
    """Bytes after which the next download breaks off or, with `hold`, waits for `go_on`."""
    hold: bool = False
    go_on: threading.Event = field(default_factory=threading.Event)
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    """Method, path and range of each request for a file."""

    def asked(self, method: str) -> list[str]:
        return [path for asked, path, _ in self.requests if asked == method]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        hub, begin = self.hub, self.answer()
        if begin is None:
            return
        stop_after, hub.stop_after = hub.stop_after, None
        self.wfile.write(hub.content[begin:stop_after])
        if stop_after is not None and hub.hold:
            assert hub.go_on.wait(60)
            with suppress(ConnectionError):  # the client has gone
                self.wfile.write(hub.content[stop_after:])
        elif stop_after is not None:
            self.close_connection = True

    def answer(self) -> int | None:
        """Sends the head, and returns the first byte of the body; None if there is no body."""
        hub, span = self.hub, self.headers.get("Range", "")
        status, code = hub.status, hub.error_code
        if "/resolve/" in self.path:
            hub.requests.append((self.command, self.path, span))
        else:
            status = 404
        if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            status, code = 403, "GatedRepo"
        failed = status >= 400
        begin = int(span.removeprefix("bytes=").partition("-")[0]) if span else 0
        self.send_response(206 if span and not failed else status)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("X-Error-Code", code)
        self.send_header("ETag", f'"{hub.sha256}"')
        self.send_header("Content-Length", "0" if failed else str(len(hub.content) - begin))
        self.send_header("Content-Range", f"bytes {begin}-{len(hub.content) - 1}/{len(hub.content)}")
        self.end_headers()
        return None if failed else begin

    def log_message(self, *arguments: object) -> None:
        pass


def point_at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # huggingface_hub reads HF_ENDPOINT when it is imported.
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


@contextmanager
def serving_hub(state: Hub) -> Iterator[str]:
    """Serves the hub on the loopback interface, and gives its URL."""
    with ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": state})) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            state.go_on.set()
            server.shutdown()
            thread.join()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    state = Hub()
    with serving_hub(state) as url:
        point_at(url, monkeypatch)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield state


@pytest.fixture
def lines() -> list[str]:
    return []


def files(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def test_the_file_arrives_whole_and_nothing_else_stays(hub: Hub, tmp_path: Path, lines: list[str]) -> None:
    path = fetch(weights(), tmp_path, lines.append)
    assert path.read_bytes() == CONTENT
    assert files(tmp_path) == [f"someone/Some-GGUF/{COMMIT}/some.gguf"]
    assert hub.asked("GET") == [f"/someone/Some-GGUF/resolve/{COMMIT}/some.gguf"]
    assert lines[0] == "some-weights: downloading 0.01 GB"
    assert lines[-1] == "some-weights: checking the SHA-256"


def test_a_second_run_asks_nobody_and_downloads_nothing(hub: Hub, tmp_path: Path, lines: list[str]) -> None:
    first = fetch(weights(), tmp_path, lines.append)
    asked = len(hub.requests)
    del lines[:]
    assert fetch(weights(), tmp_path, lines.append) == first
    assert len(hub.requests) == asked
    assert lines == ["some-weights: is there, 0.01 GB"]


def test_without_a_revision_the_newest_is_fetched_and_its_size_may_be_rounded_up(hub: Hub, tmp_path: Path) -> None:
    path = fetch(weights(revision=None, size_bytes=13_000_000), tmp_path, print)
    assert path == tmp_path / "someone/Some-GGUF/main/some.gguf"
    assert hub.asked("HEAD")[0] == "/someone/Some-GGUF/resolve/main/some.gguf"
    # The commit of the first request is downloaded, even if another one is pushed meanwhile.
    assert hub.asked("GET") == [f"/someone/Some-GGUF/resolve/{COMMIT}/some.gguf"]


def test_progress_comes_in_lines(hub: Hub, tmp_path: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "REPORT_INTERVAL", 0.01)
    hub.stop_after, hub.hold = PIECE + 1000, True

    def report(line: str) -> None:
        lines.append(line)
        if "0.01 of" in line:
            hub.go_on.set()

    fetch(weights(), tmp_path, report)
    progress = next(line for line in lines if "0.01 of" in line)
    assert re.fullmatch(r"some-weights: 0\.01 of 0\.01 GB, \d+ MB/s, \d+ s left", progress)
    assert re.fullmatch(r"some-weights: downloaded in \d+ s", lines[-2])


def test_a_connection_that_stalls_is_resumed(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    hub.stop_after, hub.hold = PIECE + 1000, True
    assert fetch(weights(), tmp_path, print).read_bytes() == CONTENT
    assert [span for method, _, span in hub.requests if method == "GET"] == ["", f"bytes={PIECE}-"]


@pytest.mark.skipif(huggingface_hub.__version__.startswith("1."), reason="resumes only what stalls")
def test_a_connection_that_breaks_is_resumed(hub: Hub, tmp_path: Path) -> None:
    hub.stop_after = PIECE + 1000
    assert fetch(weights(), tmp_path, print).read_bytes() == CONTENT
    assert [span for method, _, span in hub.requests if method == "GET"] == ["", f"bytes={PIECE}-"]


def test_two_downloads_at_a_time_do_not_disturb_each_other(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "REPORT_INTERVAL", 0.01)
    hub.stop_after, hub.hold = PIECE + 1000, True

    def report(line: str) -> None:
        if "0.01 of" in line and not hub.go_on.is_set():
            assert fetch(weights(), tmp_path, print).read_bytes() == CONTENT
            hub.go_on.set()

    assert fetch(weights(), tmp_path, report).read_bytes() == CONTENT
    assert len(hub.asked("GET")) == 2
    assert files(tmp_path) == [f"someone/Some-GGUF/{COMMIT}/some.gguf"]


def test_a_file_that_is_larger_than_the_catalogue_says_is_refused_before_it_is_downloaded(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=f"has {len(CONTENT)} bytes .* says at most {len(CONTENT) - 1}"):
        fetch(weights(size_bytes=len(CONTENT) - 1), tmp_path, print)
    assert hub.asked("GET") == []


def test_content_with_another_hash_is_refused_and_thrown_away(hub: Hub, tmp_path: Path) -> None:
    hub.content = b"x" + CONTENT[1:]
    with pytest.raises(DownloadError, match=f"arrived with SHA-256 [0-9a-f]+, not {hub.sha256}"):
        fetch(weights(), tmp_path, print)
    assert files(tmp_path) == []
    hub.content = CONTENT
    assert fetch(weights(), tmp_path, print).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("status", "code", "says"),
    [
        (404, "RepoNotFound", "the hub has no someone/Some-GGUF, or hides it. If it is private, set HF_TOKEN."),
        (404, "RevisionNotFound", f"the hub has no someone/Some-GGUF, revision {COMMIT}."),
        (404, "EntryNotFound", f"the hub has no some.gguf in someone/Some-GGUF, revision {COMMIT}."),
        (403, "GatedRepo", "someone/Some-GGUF is gated. Accept its terms on the hub, and set HF_TOKEN"),
        (403, "", "the hub answered with an error. If it is 401 or 403, see to HF_TOKEN"),
        (503, "", "the hub answered with an error. .*503"),
    ],
)
def test_what_the_hub_refuses_is_explained(hub: Hub, tmp_path: Path, status: int, code: str, says: str) -> None:
    hub.status, hub.error_code = status, code
    with pytest.raises(DownloadError, match=f"^some-weights: {says}"):
        fetch(weights(), tmp_path, print)
    assert files(tmp_path) == []


def test_a_gated_file_comes_with_the_token(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_made_up"  # noqa: S105 - of no account
    with pytest.raises(DownloadError, match="is gated"):
        fetch(weights(), tmp_path, print)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert fetch(weights(), tmp_path, print).read_bytes() == CONTENT


def test_a_hub_that_cannot_be_reached_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:  # and does not listen
        taken.bind(("127.0.0.1", 0))
        point_at(f"http://127.0.0.1:{taken.getsockname()[1]}", monkeypatch)
        with pytest.raises(DownloadError, match=r"the hub cannot be reached, or was lost\. Run it again\. \(ConnectError"):
            fetch(weights(), tmp_path, print)


# Limits files to a mebibyte, so that the write fails as on a full disk.
WITHOUT_ROOM = """
import resource, sys
from pathlib import Path
from tests.deployment.test_download import fetch, weights
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
try:
    fetch(weights(), Path(sys.argv[1]), print)
except Exception as error:
    print(type(error).__name__, error)
"""


def test_a_full_disk_is_explained_and_leaves_nothing_behind(hub: Hub, tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT_ROOM, str(tmp_path)],
        env={"HF_ENDPOINT": constants.ENDPOINT, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    said = ran.stdout.splitlines()[-1]
    assert said.startswith(f"DownloadError some-weights: no room in {tmp_path} for 0.01 GB. ([Errno {errno.EFBIG}]"), ran
    assert files(tmp_path) == []
