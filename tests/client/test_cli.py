"""The command `flywheel`, run as a user runs it: as a process of its own, in a pipe or on a terminal."""

from __future__ import annotations

import json
import math
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import time
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING

import flywheel_client
import grpc
import pytest
import trustme
from flywheel_client import Delta, Endpoint, FieldViolation, InvalidArgumentError
from flywheel_client._terminal import Output, SampleWriter, describe, show_aside, show_endpoints, show_json, show_table
from flywheel_proto._visible import visible
from flywheel_proto.v1.generation_pb2 import GenerationDelta, GenerationRequest
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, QuotaFailure, RetryInfo
from grpc_health.v1 import health_pb2

from tests.client.conftest import serving_fake, unavailable
from tests.thorough import further

if TYPE_CHECKING:
    from grpc_health.v1.health import HealthServicer

    from tests.client.conftest import FakeService

WAIT = 20.0
FLYWHEEL = [sys.executable, "-m", "flywheel_client"]

HIDDEN = "a\u202eb\U000e0041"
"""Text in another order than it seems, with text that is not seen."""


def delta(index: int, text: str, tokens: int, finish_reason: str = "") -> GenerationDelta:
    return GenerationDelta(index=index, text=text, generated_tokens=tokens, finish_reason=finish_reason, prompt_tokens=5)


def flywheel(fake: FakeService, *arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*FLYWHEEL, *arguments], input=stdin, capture_output=True, env=environment(fake), timeout=WAIT, check=False
    )


def environment(fake: FakeService) -> dict[str, str]:
    return os.environ | {"FLYWHEEL_ADDRESS": fake.address, "COLUMNS": "80"}


def on_terminal(fake: FakeService, *arguments: str) -> bytes:
    """Returns what the command writes to a terminal that is both its stdout and its stderr."""
    controller, terminal = pty.openpty()
    with subprocess.Popen(
        [*FLYWHEEL, *arguments], stdin=subprocess.DEVNULL, stdout=terminal, stderr=terminal, env=environment(fake)
    ):
        os.close(terminal)
        written = b""
        try:
            while chunk := os.read(controller, 4096):
                written += chunk
        except OSError:  # Linux reports the end of a terminal as EIO.
            pass
        finally:
            os.close(controller)
    return written.replace(b"\r\n", b"\n")


def test_one_sample_in_a_pipe_is_its_raw_text(fake: FakeService) -> None:
    fake.deltas = [delta(0, "a\x1b[31m", 1), delta(0, "[bold]b\r\n", 2), delta(0, f"é{HIDDEN}", 3, "length")]
    process = flywheel(fake, "generate", "p")
    assert process.returncode == 0
    assert process.stdout == f"a\x1b[31m[bold]b\r\né{HIDDEN}".encode()
    assert process.stderr.startswith(b"3 tokens (prompt 5), length, first text ")
    assert process.stderr.count(b"\n") == 1


def test_every_option_arrives(fake: FakeService) -> None:
    options = {
        "--max-tokens": "7",
        "--samples": "3",
        "--max-input-tokens": "9",
        "--temperature": "0",
        "--top-k": "0",
        "--top-p": "0.25",
        "--presence-penalty": "-1",
        "--frequency-penalty": "2",
    }
    repeated = ["--stop", "END", "--stop", "\n", "--eos-token-id", "2", "--eos-token-id", "5"]
    flywheel(fake, "generate", "p", *(word for option in options.items() for word in option), *repeated, "--timeout", "50")
    expected = GenerationRequest(
        text="p",
        max_tokens=7,
        num_samples=3,
        max_input_tokens=9,
        temperature=0.0,
        top_k=0,
        top_p=0.25,
        presence_penalty=-1.0,
        frequency_penalty=2.0,
        stop=["END", "\n"],
        eos_token_ids=[2, 5],
    )
    assert fake.requests == [expected]
    assert fake.seconds_remaining[0] is not None
    assert fake.seconds_remaining[0] < 51


def test_an_option_left_out_is_unset(fake: FakeService) -> None:
    flywheel(fake, "generate", "p")
    assert fake.requests == [GenerationRequest(text="p", max_tokens=128)]


@pytest.mark.parametrize(
    "case",
    [
        ([], "Grüße\n\n".encode(), "Grüße\n"),
        (["-"], b"\xef\xbb\xbfa\r\n\r\nb\r\n", "a\n\nb"),
        *further([([], b"a\rb\r\r\n", "a\rb\r"), ([], b"a\xef\xbb\xbfb\r", "a\ufeffb\r"), ([], b"\r\na", "\na")]),
    ],
)
def test_the_prompt_may_be_piped_in(fake: FakeService, case: tuple[list[str], bytes, str]) -> None:
    arguments, stdin, prompt = case
    process = flywheel(fake, "generate", *arguments, stdin=stdin)
    assert process.returncode == 0
    assert fake.requests[0].text == prompt


@pytest.mark.parametrize(
    "case",
    [
        ([b"generate", b"ab\xff"], {}, b"flywheel: prompt is not UTF-8, from byte 2 on\n"),
        *further(
            [
                (
                    [b"generate", b"a", b"--stop", b"b", b"--stop", b"\xff"],
                    {},
                    b"flywheel: stop is not UTF-8, from byte 0 on\n",
                ),
                ([b"health", b"--service", b"\xff"], {}, b"flywheel: service is not UTF-8, from byte 0 on\n"),
                ([b"stats"], {b"FLYWHEEL_ADDRESS": b"\xff:1"}, b"flywheel: address is not UTF-8, from byte 0 on\n"),
                ([b"stats"], {b"FLYWHEEL_API_KEY": b"k\xff"}, b"flywheel: api_key is not UTF-8, from byte 1 on\n"),
                ([b"stats"], {b"FLYWHEEL_CERT": b"/\xff"}, b"does not exist.\n"),
                ([b"stats", b"--timeout", b"\xff"], {}, b"Invalid value for '--timeout'"),
                ([b"endpoints", b"--app", b"\xff"], {}, b"flywheel: app is not UTF-8, from byte 0 on\n"),
                ([b"\xff"], {}, b"No such command '\\udcff'.\n"),
            ]
        ),
    ],
)
def test_bytes_that_are_not_utf_8_are_refused_by_name(
    fake: FakeService, case: tuple[list[bytes], dict[bytes, bytes], bytes]
) -> None:
    arguments, variables, message = case
    env = {os.fsencode(name): os.fsencode(value) for name, value in environment(fake).items()} | variables
    process = subprocess.run([*FLYWHEEL, *arguments], capture_output=True, env=env, timeout=WAIT, check=False)
    assert (process.returncode, process.stdout) == (2, b"")
    assert message in process.stderr
    assert b"Traceback" not in process.stderr


@pytest.mark.thorough
def test_arguments_are_utf_8_whatever_the_locale(fake: FakeService) -> None:
    env = environment(fake) | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    prompt = "Grüße, 日本"
    assert subprocess.run([*FLYWHEEL, "generate", prompt.encode()], env=env, capture_output=True, check=False).returncode == 0
    assert fake.requests[0].text == prompt


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        ([], b"", b"the prompt is empty"),
        (["-"], b"\xef\xbb\xbf\r\n", b"the prompt is empty"),
        ([""], b"", b"the prompt is empty"),
        (["-"], b"\n", b"the prompt is empty"),
        ([], b"\xef\xbb\xbf\xff", b"not UTF-8: 'utf-8' codec can't decode byte 0xff in position 3"),
        (["p", "--max-tokens", "9999999999"], b"", b"max_tokens"),
        (["p", "--max-tokens", "many"], b"", b"--max-tokens"),
        (["p", "--wat"], b"", b"--wat"),
        (["p", "--timeout", "0"], b"", b"--timeout"),
    ],
)
def test_wrong_usage(fake: FakeService, arguments: list[str], stdin: bytes, message: bytes) -> None:
    process = flywheel(fake, "generate", *arguments, stdin=stdin)
    assert process.returncode == 2
    assert process.stdout == b""
    assert message in process.stderr
    assert not fake.requests


@pytest.mark.parametrize("command", [["generate"], *further([["generate", "-", "--json"]])])
def test_an_endless_prompt_is_refused(fake: FakeService, command: list[str]) -> None:
    with Path("/dev/zero").open("rb") as endless:
        process = subprocess.run(
            [*FLYWHEEL, *command], stdin=endless, capture_output=True, env=environment(fake), timeout=WAIT, check=False
        )
    assert (process.returncode, process.stderr) == (2, b"flywheel: the prompt on stdin is longer than 64 MiB\n")


def test_several_samples_follow_one_another(fake: FakeService) -> None:
    fake.deltas = [
        delta(1, "B1", 1),
        delta(0, "A1", 1),
        delta(2, "C1", 1, "stop"),
        delta(0, "A2", 2, "stop"),
        delta(1, "B2\n", 2, "length"),
    ]
    process = flywheel(fake, "generate", "p", "-n", "3")
    assert process.returncode == 0
    expected = "── sample 0 ──\nA1A2\n\n── sample 1 ──\nB1B2\n\n── sample 2 ──\nC1\n"
    assert process.stdout.decode() == expected
    assert [line.split(b",")[0] for line in process.stderr.splitlines()] == [
        b"sample 0: 2 tokens (prompt 5)",
        b"sample 1: 2 tokens (prompt 5)",
        b"sample 2: 1 tokens (prompt 5)",
    ]


def test_no_text_is_lost_where_a_call_fails(fake: FakeService) -> None:
    fake.deltas = [delta(0, "A1", 1), delta(1, "B1", 1), delta(2, "C1", 1)]
    fake.fail(grpc.StatusCode.INTERNAL, "the engine failed", ErrorInfo(reason="ENGINE_FAILED", domain="flywheel.v1"))
    process = flywheel(fake, "generate", "p", "-n", "3")
    assert process.returncode == 1
    assert process.stdout.decode() == "── sample 0 ──\nA1\n\n── sample 1 ──\nB1\n\n── sample 2 ──\nC1\n"
    assert process.stderr.startswith(b"flywheel: INTERNAL: the engine failed\n  request id: ")


def test_a_terminal_gets_no_control_characters_of_the_model(fake: FakeService) -> None:
    fake.deltas = [delta(0, f"a\x1b]52;c;x\x07\x9b31m\x7f\r[red]b[/red]\tc{HIDDEN}\n", 1), delta(0, "d", 2, "\x1b[2Jstop")]
    written = on_terminal(fake, "generate", "p").decode()
    text, summary = written.split("\nd\n")
    assert text == "a␛]52;c;x␇\ufffd31m␡␍[red]b[/red]\tca\ufffdb\ufffd"
    assert "␛[2Jstop" in summary
    assert summary.startswith("\x1b[2m2 tokens (prompt 5)")


def test_headings_on_a_terminal_are_bold(fake: FakeService) -> None:
    fake.deltas = [delta(0, "A", 1, "stop"), delta(1, "B", 1, "stop")]
    written = on_terminal(fake, "generate", "p", "-n", "2").decode()
    assert written.startswith("\x1b[1m── sample 0 ──\x1b[0m\nA\n\n\x1b[1m── sample 1 ──\x1b[0m\nB\n")


@pytest.mark.parametrize("variables", [{"NO_COLOR": "1"}, *further([{"TERM": "dumb"}])])
def test_a_terminal_gets_no_escape_sequence_if_none_is_wanted(
    fake: FakeService, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    fake.deltas = [delta(0, "A", 1, "stop"), delta(1, "B", 1, "stop")]
    written = on_terminal(fake, "generate", "p", "-n", "2").decode()
    assert written.startswith("── sample 0 ──\nA\n\n── sample 1 ──\nB\nsample 0: 1 tokens")
    assert "\x1b" not in written


@pytest.mark.parametrize("arguments", further([["model"], ["stats"], ["stats", f"--{HIDDEN}"]]))
def test_a_terminal_gets_nothing_invisible_of_servers_and_arguments(fake: FakeService, arguments: list[str]) -> None:
    fake.model_name = HIDDEN
    if arguments == ["stats"]:
        fake.fail(grpc.StatusCode.INTERNAL, HIDDEN)
    written = on_terminal(fake, *arguments).decode()
    # Some versions of click quote an option that there is not.
    assert "a\ufffdb\ufffd" in written or ascii(HIDDEN)[1:-1] in written
    assert not set(HIDDEN) & set(written) - set("ab")


def test_the_message_of_an_error_is_made_visible(fake: FakeService) -> None:
    fake.fail(grpc.StatusCode.INTERNAL, "\x1b[2Jbad")
    assert b"\x1b" not in flywheel(fake, "stats").stderr


LINE_BREAKS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"


def test_no_line_break_of_a_server_poses_as_another_line(capsys: pytest.CaptureFixture[str]) -> None:
    forged = "".join(f"a{line_break}request id: b" for line_break in LINE_BREAKS)
    show_table([("name", forged), ("engine", "e")])
    table = capsys.readouterr().out
    assert [line.split()[0] for line in table.splitlines()] == ["name", "engine"]

    writer = SampleWriter(Output(sys.stdout), 1)
    writer.add(Delta(0, "A\n", 1, 1.0, forged, 1, LINE_BREAKS), 1.0)
    show_aside(writer.summary())
    assert len(capsys.readouterr().err.splitlines()) == 1

    show_endpoints([Endpoint("a:1", "tunnel", forged, 1.0, 1.0)], 2.0)
    assert len(capsys.readouterr().out.splitlines()) == 2

    violations = [FieldViolation(forged, forged), FieldViolation(forged, "d")]
    error = InvalidArgumentError(grpc.StatusCode.INVALID_ARGUMENT, forged, violations=violations, request_id=forged)
    assert len(describe(error, "advice").splitlines()) == 5


def test_json_is_one_line_for_each_finished_sample(fake: FakeService) -> None:
    fake.samples[0].text = "a\x9bé\n"
    fake.samples[0].finished = math.inf
    process = flywheel(fake, "generate", "p", "--json")
    assert process.stdout.count(b"\n") == 1
    assert process.stdout.isascii()
    assert json.loads(process.stdout) == {
        "text": "a\x9bé\n",
        "generated_tokens": 2,
        "finished": "Infinity",
        "finish_reason": "stop",
        "index": 0,
        "prompt_tokens": 5,
        "stop_sequence": "###",
    }
    assert process.stderr == b""


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_interrupt_cancels_and_exits_with_130(fake: FakeService, arguments: list[str]) -> None:
    fake.hangs = True
    with subprocess.Popen(
        [*FLYWHEEL, "generate", "p", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(fake)
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(3)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=WAIT)
    assert process.returncode == 130
    assert errors == b""
    assert fake.cancelled.wait(WAIT)


def test_a_reader_that_has_seen_enough_ends_the_command_quietly(fake: FakeService) -> None:
    fake.deltas = [delta(0, "x" * 4096 + "\n", 1)] * 1000
    fake.hangs = True
    with subprocess.Popen(
        [*FLYWHEEL, "generate", "p"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(fake)
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(WAIT) == 141
    assert fake.cancelled.wait(WAIT)


@pytest.mark.parametrize("module", ["google", *further(["flywheel_proto._visible", "grpc", "asyncio", "click"])])
def test_an_interrupt_while_it_is_loaded_ends_it_quietly(module: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-X", "importtime", *FLYWHEEL[1:], "stats", "--address", "localhost:1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stderr is not None
        while module not in (line := process.stderr.readline().decode()):
            assert line, "it has ended"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=WAIT)
    assert process.returncode == 130
    assert b"Traceback" not in errors


def test_an_interrupt_ends_it_while_nobody_reads(fake: FakeService) -> None:
    fake.deltas = [delta(0, "x" * 2**20, 1)]
    reading, writing = os.pipe()
    with subprocess.Popen(
        [*FLYWHEEL, "generate", "p"], stdout=writing, stderr=subprocess.PIPE, env=environment(fake)
    ) as process:
        select.select([reading], [], [], WAIT)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=WAIT)
    os.close(reading)
    os.close(writing)
    assert (process.returncode, errors) == (130, b"")


@pytest.mark.thorough
def test_pipes_that_do_not_block_lose_nothing(fake: FakeService) -> None:
    fake.deltas = [delta(0, "x" * 2**20, 1, "stop")]
    pipes = os.pipe(), os.pipe()
    for descriptor in (*pipes[0], *pipes[1]):
        os.set_blocking(descriptor, False)
    (stdin, asking), (answered, stdout) = pipes
    with subprocess.Popen([*FLYWHEEL, "generate"], stdin=stdin, stdout=stdout, env=environment(fake)) as process:
        os.close(stdin)
        os.close(stdout)
        os.write(asking, b"a ")
        # By then the command may have found nothing more to read.
        time.sleep(0.5)
        os.write(asking, b"prompt")
        os.close(asking)
        os.set_blocking(answered, True)
        with os.fdopen(answered, "rb") as file:
            assert len(file.read()) == 2**20
    assert process.returncode == 0
    assert fake.requests[0].text == "a prompt"


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


def test_a_generation_is_tried_again(fake: FakeService) -> None:
    unavailable(fake)
    fake.recovers_after = 1
    process = flywheel(fake, "generate", "p")
    assert (process.returncode, process.stdout) == (0, b"abc")
    assert len(fake.requests) == 2


def test_an_interrupt_ends_the_wait_for_another_attempt(fake: FakeService) -> None:
    fake.refuses = True
    fake.fail(grpc.StatusCode.UNAVAILABLE, "stopping", RetryInfo(retry_delay=Duration(seconds=1000)))
    with subprocess.Popen(
        [*FLYWHEEL, "generate", "p"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(fake)
    ) as process:
        assert fake.called.wait(WAIT)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=WAIT) == (b"", b"")
    assert process.returncode == 130
    assert len(fake.requests) == 1


def test_a_command_may_wait_for_the_server() -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
    command = [*FLYWHEEL, "stats", "--address", f"127.0.0.1:{port}", "--json", "--timeout", str(WAIT)]
    with subprocess.Popen([*command, "--wait-for-ready"], stdout=subprocess.PIPE) as waiting:
        # While this one fails, the other waits.
        assert subprocess.run(command, capture_output=True, check=False).returncode == 1
        with serving_fake(port=port):
            answer, _ = waiting.communicate(timeout=WAIT)
    assert json.loads(answer)["active"] == 2


def test_an_unreachable_server(fake: FakeService) -> None:
    process = flywheel(fake, "health", "--address", "127.0.0.1:1")
    assert process.returncode == 1
    assert b"Is flywheel-server running at 127.0.0.1:1?" in process.stderr
    assert b"Traceback" not in process.stderr


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


def test_the_table_of_endpoints(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_800_000_000.0
    endpoints = [
        Endpoint("workspace--gatewayserver.test:443", "server", None, None, None),
        Endpoint("wtqcahqwhd4tu0.r5.modal.test:443", "tunnel", "ta-01JABCDEFGHJKMNPQRSTVWXYZ0", now - 200_000, now - 12),
        Endpoint("r5.modal.test:40001", "tunnel", "ta-2", now - 7_300, now + 2),
    ]
    monkeypatch.setenv("COLUMNS", "80")
    show_endpoints(endpoints, now)
    assert capsys.readouterr().out == (
        "ADDRESS                            KIND    AGE  REFRESHED  CONTAINER\n"
        "workspace--gatewayserver.test:443  server  -    -          -\n"
        "wtqcahqwhd4tu0.r5.modal.test:443   tunnel  2d   12s        ta-01JABCDEFGHJKMNPQRSTVWXYZ0\n"
        "r5.modal.test:40001                tunnel  2h   0s         ta-2\n"
    )
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    show_endpoints(endpoints, now)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "wtqcahqwhd4tu0.r5.modal.test:443   tunnel  2d   12s        ta-01JABCDEFGHJKMNPQ…"
    assert max(map(len, lines)) == 80


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


def test_a_base_install_says_what_is_missing() -> None:
    program = "import sys; sys.modules['click'] = None; from flywheel_client.__main__ import main; main()"
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert process.returncode == 1
    assert process.stderr == "flywheel: click is not installed; install it with: pip install 'flywheel-grpc[cli]'\n"


def test_control_characters_have_pictures() -> None:
    shown = visible("".join(map(chr, range(0x100))))
    assert len(shown) == 0x100
    assert [character for character in shown if not character.isprintable()] == ["\t", "\n", "\xa0"]


@pytest.mark.parametrize(
    "text",
    ["👩‍🚀", "❤️‍🔥", "🏳️‍🌈", "👁️‍🗨️", "1️⃣ #️⃣", "می‌خواهم", "क्‍ष", "葛\U000e0100", "ភាសា\u200bខ្មែរ", "\u1820\u180b", "\u0600", "\ue0b0"],
)
def test_what_a_script_or_an_emoji_is_written_with_remains(text: str) -> None:
    assert visible(text) == text
    shown = ""
    for position, character in enumerate(text):
        shown += visible(character, text[:position][-2:])
    assert shown == text


@pytest.mark.parametrize(
    "text",
    [
        *(
            "\u00ad",
            "\u034f",
            "\u061c",
            "\u115f",
            "\u180e",
            "\u200b",
            "\u200c",
            "\u200d",
            "\u200e",
            "\u200f",
            "\u2028",
            "\u2029",
        ),
        *(
            "\u202a",
            "\u202e",
            "\u2060",
            "\u2064",
            "\u2065",
            "\u2066",
            "\u2069",
            "\u3164",
            "\ufe00",
            "\ufe0f",
            "\ufeff",
            "\uffa0",
        ),
        *("\ufff9", "\ufffb", "\U0001bca0", "\U0001d173", "\U000e0000", "\U000e0001", "\U000e007f", "\U000e0100", "\U000e01ef"),
    ],
    ids=ascii,
)
def test_what_is_invisible_or_changes_the_order_of_text_is_shown(text: str) -> None:
    assert visible(f"a{text}b {text}") == "a\ufffdb \ufffd"
    # After a character that may have one of these, a second one would be hidden.
    assert visible(f"é{text}{text}{text}")[2:] == "\ufffd\ufffd"


def test_every_format_character_is_shown_or_has_a_glyph() -> None:
    everything = map(chr, range(sys.maxunicode + 1))
    kept = {each for each in everything if unicodedata.category(each) in {"Cc", "Cf", "Zl", "Zp"} and visible(each) == each}
    # Those of Arabic, Syriac, Kaithi and Egyptian are drawn around or under what follows.
    with_glyphs = {*range(0x600, 0x606), 0x6DD, 0x70F, 0x890, 0x891, 0x8E2, 0x110BD, 0x110CD, *range(0x13430, 0x13440)}
    assert kept <= {"\t", "\n", *map(chr, with_glyphs)}


def test_json_has_no_number_for_infinity(capsys: pytest.CaptureFixture[str]) -> None:
    show_json({"a": [math.inf, {"b": -math.inf}], "c": (math.nan, 1.5, 1, None, True)})
    written = capsys.readouterr().out
    assert json.loads(written) == {"a": ["Infinity", {"b": "-Infinity"}], "c": ["NaN", 1.5, 1, None, True]}


def test_the_second_sample_is_written_while_it_is_made(capsys: pytest.CaptureFixture[str]) -> None:
    writer = SampleWriter(Output(sys.stdout), 2)
    for index, text, end in [(0, "A", "stop"), (1, "B", ""), (1, "C", "")]:
        writer.add(Delta(index, text, 1, 0.0, end, 0, ""), 0.5)
    assert capsys.readouterr().out == "── sample 0 ──\nA\n\n── sample 1 ──\nBC"


def test_the_summary_tells_the_speed_after_the_first_text(capsys: pytest.CaptureFixture[str]) -> None:
    writer = SampleWriter(Output(sys.stdout), 1)
    writer.add(Delta(0, "A", 2, 0.0, "", 0, ""), 0.5)
    writer.add(Delta(0, "B", 12, 1.0, "stop", 5, "\n"), 1.5)
    writer.finish()
    assert capsys.readouterr().out == "AB"
    expected = '12 tokens (prompt 5), stop "\\n", first text 0.50 s, 10.0 tokens/s'
    assert list(writer.summary()) == [expected]
