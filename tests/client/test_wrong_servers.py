"""What `flywheel` says if it reaches something else than the server that its options describe."""

from __future__ import annotations

import socket
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import grpc
import pytest
import trustme
from h2.errors import ErrorCodes

from tests.client.command import flywheel
from tests.client.conftest import serving_fake
from tests.client.hostile import HEADERS, GoAway, Headers, Reset
from tests.client.test_hostile_answers import serving
from tests.thorough import further

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.client.conftest import FakeService

TRUSTING = ("--cacert", "ca.pem")
NO_TLS = "What listens there does not speak TLS"
HANGS_UP = "What listens there hangs up, as a server does if it requires TLS"
OTHER_NAME = "Its certificate is for another name."


@pytest.fixture
def authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> trustme.CA:
    monkeypatch.chdir(tmp_path)
    authority = trustme.CA()
    authority.cert_pem.write_to_path("ca.pem")
    trustme.CA().cert_pem.write_to_path("other.pem")
    return authority


@contextmanager
def with_tls(authority: trustme.CA, name: str, *, wants_certificates: bool = False) -> Iterator[FakeService]:
    certificate = authority.issue_cert(name)
    pair = certificate.private_key_pem.bytes(), certificate.cert_chain_pems[0].bytes()
    trusted = authority.cert_pem.bytes() if wants_certificates else None
    with serving_fake(credentials=grpc.ssl_server_credentials([pair], trusted, wants_certificates)) as fake:
        yield fake


@contextmanager
def saying(words: bytes) -> Iterator[str]:
    """Gives the address of a server that says the same to every client."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    client, _ = listening.accept()
                    with client, suppress(OSError):
                        client.sendall(words)
                        # Reads until the client hangs up: closing a socket with unread data would discard the words.
                        while client.recv(2**16):
                            pass

        threading.Thread(target=serve, daemon=True).start()
        yield "{}:{}".format(*listening.getsockname())
        listening.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("options", [("--tls",), *further([TRUSTING])])
def test_a_server_without_tls(fake: FakeService, authority: trustme.CA, options: tuple[str, ...]) -> None:
    assert NO_TLS in flywheel(fake, "stats", *options).stderr.decode()


@pytest.mark.parametrize(
    "case",
    [
        ("127.0.0.1", False, (), HANGS_UP),
        *further(
            [
                ("127.0.0.1", True, TRUSTING, HANGS_UP),
                ("127.0.0.1", False, ("--tls",), "Its certificate is not trusted"),
                ("127.0.0.1", False, ("--cacert", "other.pem"), "Its certificate is not trusted"),
                ("example.com", False, TRUSTING, OTHER_NAME),
            ]
        ),
    ],
)
def test_a_server_with_tls(authority: trustme.CA, case: tuple[str, bool, tuple[str, ...], str]) -> None:
    name, wants_certificates, options, hint = case
    with with_tls(authority, name, wants_certificates=wants_certificates) as fake:
        process = flywheel(fake, "stats", *options)
    assert process.returncode == 1
    assert hint in process.stderr.decode()


@pytest.mark.parametrize(
    "command", further([("stats", "--cacert"), ("endpoints", "--cacert"), ("health", "--key", "ca.pem", "--cert")])
)
def test_a_file_that_is_no_pem(fake: FakeService, authority: trustme.CA, tmp_path: Path, command: tuple[str, ...]) -> None:
    (tmp_path / "no.pem").write_text("no certificate")
    process = flywheel(fake, *command, "no.pem")
    assert process.returncode == 2
    assert f"{command[-1]} must be a file in PEM, which no.pem is not" in process.stderr.decode()


@pytest.mark.parametrize("words", [b"HTTP/1.1 400 Bad Request\r\n\r\n", *further([b"SSH-2.0-OpenSSH_9.9\r\n"])])
def test_a_server_of_another_protocol(fake: FakeService, words: bytes) -> None:
    with saying(words) as address:
        process = flywheel(fake, "stats", "--address", address)
    assert process.returncode == 1
    assert process.stderr.decode().count("What listens there is not a gRPC server, or it requires TLS") == 1


@pytest.mark.parametrize(
    "case",
    [
        (Reset(ErrorCodes.INTERNAL_ERROR), False),
        *further([(GoAway(ErrorCodes.NO_ERROR), True), (Headers(HEADERS, end=True), False)]),
    ],
)
def test_a_server_that_was_reached_is_not_taken_for_another(
    fake: FakeService, case: tuple[Reset | GoAway | Headers, bool]
) -> None:
    step, asks = case
    with serving([step]) as server:
        errors = flywheel(fake, "stats", "--address", server.address).stderr.decode()
    assert "What listens there" not in errors
    assert ("Is flywheel-server running" in errors) is asks
