"""How the command `flywheel` reaches a server, and what it says about the server: health, stats and model; keys and TLS."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import flywheel_client
import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2

from tests.client.command import FLYWHEEL, WAIT, environment, flywheel
from tests.client.conftest import serving_fake

if TYPE_CHECKING:
    from pathlib import Path

    from grpc_health.v1.health import HealthServicer

    from tests.client.conftest import FakeService


def test_a_command_may_wait_for_the_server(free_port: int) -> None:
    command = [*FLYWHEEL, "stats", "--address", f"127.0.0.1:{free_port}", "--json", "--timeout", str(WAIT)]
    with subprocess.Popen([*command, "--wait-for-ready"], stdout=subprocess.PIPE) as waiting:
        # While this one fails, the other waits.
        assert subprocess.run(command, capture_output=True, check=False).returncode == 1
        with serving_fake(port=free_port):
            answer, _ = waiting.communicate(timeout=WAIT)
    assert json.loads(answer)["active"] == 2


@pytest.mark.parametrize(("status", "code"), [("SERVING", 0), ("NOT_SERVING", 1), ("UNKNOWN", 1)])
def test_health(fake: FakeService, health: HealthServicer, status: str, code: int) -> None:
    health.set("", health_pb2.HealthCheckResponse.ServingStatus.Value(status))
    process = flywheel(fake, "health")
    assert (process.returncode, process.stdout.decode()) == (code, f"{status}\n")
    process = flywheel(fake, "health", "--json")
    assert (process.returncode, json.loads(process.stdout)) == (code, {"status": status})


def test_stats(fake: FakeService) -> None:
    assert flywheel(fake, "stats").stdout.decode() == (
        "active calls           2\nqueued calls           1\nbacklog of the engine  3\nrunners of the engine  1\n"
    )
    expected = {"backlog": 3, "num_total_runners": 1, "active": 2, "queued": 1}
    assert json.loads(flywheel(fake, "stats", "--json").stdout) == expected


def test_model(fake: FakeService) -> None:
    lines = flywheel(fake, "model").stdout.decode().splitlines()
    assert lines[0].split() == ["name", "SmolLM2-135M"]
    assert lines[-1].split() == ["defaults.top_p", "1"]
    found = json.loads(flywheel(fake, "model", "--json").stdout)
    assert (found["limits"]["max_num_samples"], found["defaults"]["top_k"]) == (16, 50)


@pytest.mark.parametrize("options", [["--api-key", "key-1"], []])
def test_the_key_arrives_and_is_never_shown(fake: FakeService, options: list[str]) -> None:
    variables = environment(fake) | ({} if options else {"FLYWHEEL_API_KEY": "key-1"})
    shown = b""
    for arguments in (["generate", "p"], ["stats", "--address", "localhost:1"], ["stats", "--wat"], ["stats", "--help"]):
        process = subprocess.run(
            [*FLYWHEEL, *arguments, *options], capture_output=True, env=variables, timeout=WAIT, check=False
        )
        shown += process.stdout + process.stderr
    assert fake.metadata[0]["authorization"] == "Bearer key-1"
    assert b"key-1" not in shown
    assert b"FLYWHEEL_API_KEY" in shown


def test_tls(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    certificate = authority.issue_cert("localhost")
    chain = b"".join(blob.bytes() for blob in certificate.cert_chain_pems)
    credentials = grpc.ssl_server_credentials([(certificate.private_key_pem.bytes(), chain)])
    with serving_fake(credentials=credentials, host="localhost") as fake:
        trusting = flywheel(fake, "model", "--cacert", str(tmp_path / "ca.pem"))
        assert trusting.returncode == 0, trusting.stderr
        for options, code in ((["--tls"], 1), (["--tls", "--cacert", str(tmp_path / "ca.pem")], 0), ([], 1)):
            assert flywheel(fake, "model", *options).returncode == code
        roots = {"GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": str(tmp_path / "ca.pem"), "FLYWHEEL_TLS": "1"}
        for options, code in (([], 0), (["--no-tls"], 1)):
            variables = environment(fake) | roots
            process = subprocess.run(
                [*FLYWHEEL, "model", *options], capture_output=True, env=variables, timeout=WAIT, check=False
            )
            assert process.returncode == code, process.stderr


def test_mutual_tls(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    server, client = authority.issue_cert("localhost"), authority.issue_cert("client")
    client.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    for blob in client.cert_chain_pems:
        blob.write_to_path(str(tmp_path / "cert.pem"), append=True)
    chain = b"".join(blob.bytes() for blob in server.cert_chain_pems)
    credentials = grpc.ssl_server_credentials(
        [(server.private_key_pem.bytes(), chain)], authority.cert_pem.bytes(), require_client_auth=True
    )
    own = {"FLYWHEEL_CERT": str(tmp_path / "cert.pem"), "FLYWHEEL_KEY": str(tmp_path / "key.pem")}
    options = ["--cert", own["FLYWHEEL_CERT"], "--key", own["FLYWHEEL_KEY"]]
    with serving_fake(credentials=credentials, host="localhost") as fake:
        for shown, variables, code in ((options, {}, 0), ([], own, 0), ([], {}, 1)):
            process = subprocess.run(
                [*FLYWHEEL, "model", "--cacert", str(tmp_path / "ca.pem"), *shown],
                capture_output=True,
                env=environment(fake) | variables,
                timeout=WAIT,
                check=False,
            )
            assert process.returncode == code, process.stderr


def test_version(fake: FakeService) -> None:
    assert flywheel(fake, "--version").stdout.decode() == f"flywheel {flywheel_client.__version__}\n"


def test_help_tells_the_exit_codes(fake: FakeService) -> None:
    assert b"Exit codes: 0" in flywheel(fake, "--help").stdout


@pytest.mark.parametrize(
    ("words", "completed"),
    [("flywheel he", "health"), pytest.param("flywheel health --wai", "--wait-for-ready", marks=pytest.mark.thorough)],
)
def test_a_shell_is_told_how_words_go_on(words: str, completed: str) -> None:
    typed = {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" ")), "_FLYWHEEL_COMPLETE": "bash_complete"}
    program = "from flywheel_client.__main__ import main; main()"
    process = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=os.environ | typed, check=True
    )
    assert (process.stdout, process.stderr) == (f"plain,{completed}\n", "")
