"""`flywheel generate`: its prompt and options arrive, and its samples are printed."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from flywheel_client._terminal import show_json
from flywheel_proto.v1.generation_pb2 import Choices, GenerationRequest
from google.rpc.error_details_pb2 import ErrorInfo

from tests.client.command import FLYWHEEL, HIDDEN, WAIT, delta, environment, flywheel
from tests.client.conftest import unavailable
from tests.thorough import further

if TYPE_CHECKING:
    from tests.client.conftest import FakeService


def test_one_sample_in_a_pipe_is_its_raw_text(fake: FakeService) -> None:
    fake.deltas = [delta(0, "a\x1b[31m", 1), delta(0, "[bold]b\r\n", 2), delta(0, f"é{HIDDEN}", 3, "length")]
    process = flywheel(fake, "generate", "p")
    assert process.returncode == 0
    assert process.stdout == f"a\x1b[31m[bold]b\r\né{HIDDEN}".encode()
    assert process.stderr.startswith(b"3 tokens (prompt 5), length, first text ")
    assert process.stderr.count(b"\n") == 1


OPTIONS: dict[str, tuple[str, Any]] = {
    "--max-tokens": ("max_tokens", 7),
    "--samples": ("num_samples", 3),
    "--stop": ("stop", ["END", "\n"]),
    "--eos-token-id": ("eos_token_ids", [2, 5]),
    "--max-input-tokens": ("max_input_tokens", 9),
    "--temperature": ("temperature", 0),
    "--top-k": ("top_k", 0),
    "--top-p": ("top_p", 0.25),
    "--presence-penalty": ("presence_penalty", -1),
    "--frequency-penalty": ("frequency_penalty", 2),
    "--seed": ("seed", 0),
    "--min-p": ("min_p", 0.5),
    "--repetition-penalty": ("repetition_penalty", 1.5),
    "--logit-bias": ("logit_bias", {7: -100, 8: 0.5}),
    "--choice": ("choices", ["yes", "no"]),
    "--logprobs": ("logprobs", 3),
    "--time-limit": ("time_limit", 2.5),
    "--priority": ("priority", -5),
}
"""The field of each option, and a value, without the options that exclude each other."""


def test_every_option_arrives(fake: FakeService) -> None:
    words = ["generate", "p", "--timeout", "50"]
    for option, (_, value) in OPTIONS.items():
        values = [f"{key}={each}" for key, each in value.items()] if isinstance(value, dict) else value
        words += [word for each in (values if isinstance(values, list) else [values]) for word in (option, str(each))]
    flywheel(fake, *words)
    fields = dict(OPTIONS.values())
    fields["choices"] = Choices(texts=fields["choices"])
    assert fake.requests == [GenerationRequest(text="p", **fields)]
    others = {"text", "messages", "prompt_token_ids", "json_schema", "regex"}
    assert others | fields.keys() == set(GenerationRequest.DESCRIPTOR.fields_by_name)
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
        (["p", "--logit-bias", "5"], b"", b"'--logit-bias': '5' is not the id of a token and a bias"),
        pytest.param(
            ["p", "--logit-bias", "5=1", "--logit-bias", "5=2"],
            b"",
            b"'--logit-bias': the id 5 has two biases",
            marks=pytest.mark.thorough,
        ),
        pytest.param(
            ["p", "--json-schema", "/absent"],
            b"",
            b"'--json-schema': File '/absent' does not exist.",
            marks=pytest.mark.thorough,
        ),
        pytest.param(
            ["p", "--json-schema", sys.executable], b"", b"--json-schema must be a file in UTF-8", marks=pytest.mark.thorough
        ),
        (["p", "--regex", "a", "--choice", "a"], b"", b"give only one of --choice and --regex"),
        pytest.param(["p", "--seed", "-9999999999"], b"", b"seed", marks=pytest.mark.thorough),
        (["--chat", "--json"], b"", b"give --chat or --json, not both"),
        pytest.param(["--chat", "-n", "2"], b"", b"give --chat or --samples, not both", marks=pytest.mark.thorough),
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


def test_no_text_is_lost_if_a_call_fails(fake: FakeService) -> None:
    fake.deltas = [delta(0, "A1", 1), delta(1, "B1", 1), delta(2, "C1", 1)]
    fake.fail(grpc.StatusCode.INTERNAL, "the engine failed", ErrorInfo(reason="ENGINE_FAILED", domain="flywheel.v1"))
    process = flywheel(fake, "generate", "p", "-n", "3")
    assert process.returncode == 1
    assert process.stdout.decode() == "── sample 0 ──\nA1\n\n── sample 1 ──\nB1\n\n── sample 2 ──\nC1\n"
    assert process.stderr.startswith(b"flywheel: INTERNAL: the engine failed\n  request id: ")


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
        "seed": 0,
    }
    assert process.stderr == b""


def test_a_generation_is_tried_again(fake: FakeService) -> None:
    unavailable(fake)
    fake.recovers_after = 1
    process = flywheel(fake, "generate", "p")
    assert (process.returncode, process.stdout) == (0, b"abc")
    assert len(fake.requests) == 2


def test_json_has_no_number_for_infinity(capsys: pytest.CaptureFixture[str]) -> None:
    show_json({"a": [math.inf, {"b": -math.inf}], "c": (math.nan, 1.5, 1, None, True)})
    written = capsys.readouterr().out
    assert json.loads(written) == {"a": ["Infinity", {"b": "-Infinity"}], "c": ["NaN", 1.5, 1, None, True]}
