"""What the command `flywheel` says if a call fails, and how it exits."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, QuotaFailure, RetryInfo

from tests.client.command import flywheel

if TYPE_CHECKING:
    from tests.client.conftest import FakeService


@pytest.mark.parametrize(
    ("message", "headline"),
    [
        ("two fields", " two fields"),
        ("Invalid request: max_tokens must be 1 to 2048; stop[1] must not be empty.", ""),
    ],
)
def test_an_invalid_argument_lists_every_violation_once(fake: FakeService, message: str, headline: str) -> None:
    violations = [
        BadRequest.FieldViolation(field="max_tokens", description="must be 1 to 2048"),
        BadRequest.FieldViolation(field="stop[1]", description="must not be empty"),
    ]
    fake.deltas = []
    fake.fail(grpc.StatusCode.INVALID_ARGUMENT, message, BadRequest(field_violations=violations))
    fake.request_id = "r1"
    process = flywheel(fake, "generate", "p")
    assert process.returncode == 2
    assert process.stderr.decode() == (
        f"flywheel: INVALID_ARGUMENT:{headline}\n"
        "  max_tokens must be 1 to 2048\n"
        "  stop[1] must not be empty\n"
        "  request id: r1\n"
    )


def test_an_error_says_when_to_try_again(fake: FakeService) -> None:
    retry = RetryInfo(retry_delay=Duration(seconds=1, nanos=420_000_000))
    fake.fail(grpc.StatusCode.UNAVAILABLE, "the server is full", retry, ErrorInfo(reason="OVERLOADED"))
    process = flywheel(fake, "model")
    assert process.returncode == 1
    assert process.stderr.decode().startswith(
        "flywheel: UNAVAILABLE: the server is full\n  Try again in 1.5 s.\n  request id: "
    )


def test_an_error_names_the_quotas(fake: FakeService) -> None:
    failure = QuotaFailure(
        violations=[
            QuotaFailure.Violation(subject="ci", description="100 tokens per minute"),
            QuotaFailure.Violation(subject="ci", description="2 samples at a time"),
        ]
    )
    fake.fail(grpc.StatusCode.RESOURCE_EXHAUSTED, "The quota of ci is used up: 100 tokens per minute.", failure)
    assert (
        flywheel(fake, "stats")
        .stderr.decode()
        .startswith(
            "flywheel: RESOURCE_EXHAUSTED: The quota of ci is used up: 100 tokens per minute.\n"
            "  ci: 2 samples at a time\n"
            "  request id: "
        )
    )


def test_an_unreachable_server(fake: FakeService) -> None:
    process = flywheel(fake, "health", "--address", "127.0.0.1:1")
    assert process.returncode == 1
    assert b"Is flywheel-server running at 127.0.0.1:1?" in process.stderr
    assert b"Traceback" not in process.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--api-key", "ü"], "flywheel: api_key must be one or more visible ASCII characters\n"),
        (["--modal-app", "a", "--address", "localhost:1"], "flywheel: give --address or --modal-app, not both\n"),
        (["--modal-environment", "a"], "flywheel: --modal-environment needs --modal-app\n"),
        (["--cacert", "/absent"], "ile '/absent' does not exist.\n"),
        (["--cert", __file__], "flywheel: --cert and --key need each other\n"),
        (["--key", __file__], "flywheel: --cert and --key need each other\n"),
    ],
)
def test_wrong_options_of_the_server(fake: FakeService, arguments: list[str], message: str) -> None:
    process = flywheel(fake, "stats", *arguments)
    assert (process.returncode, process.stdout) == (2, b"")
    assert process.stderr.decode().endswith(message)


def test_a_base_install_says_what_is_missing() -> None:
    program = "import sys; sys.modules['click'] = None; from flywheel_client.__main__ import main; main()"
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert process.returncode == 1
    assert process.stderr == "flywheel: click is not installed; install it with: pip install 'flywheel-grpc[cli]'\n"
