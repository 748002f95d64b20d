"""The command `flywheel` and contract 1.1: conversations, constraints, tokens, and servers that are too old for them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import grpc
import pytest
from flywheel_client import LikelyToken, Token
from flywheel_client._token_table import token_table
from flywheel_proto.v1 import generation_pb2
from flywheel_proto.v1.generation_pb2 import GenerationRequest, Message

from tests.client.command import delta, flywheel, on_terminal
from tests.client.conftest import sample
from tests.thorough import further

if TYPE_CHECKING:
    from pathlib import Path

    from tests.client.conftest import FakeService

TOKENS = [
    generation_pb2.Token(
        id=5,
        text=b" Paris",
        logprob=-0.105,
        likeliest=[
            generation_pb2.LikelyToken(id=5, text=b" Paris", logprob=-0.105),
            generation_pb2.LikelyToken(id=6, text=b"\xe2\x82", logprob=-3.2),
        ],
    ),
    generation_pb2.Token(id=2, logprob=-0.7, likeliest=[generation_pb2.LikelyToken(id=2, logprob=-0.7)] * 8),
]
TABLE = [
    " logprob  probability  token     likeliest",
    '  -0.105        90.0%  " Paris"  " Paris" 90.0%  <0xE2><0x82> 4.1%',
    "  -0.700        49.7%  id 2      " + "  ".join(["id 2 49.7%"] * 8),
]


def test_a_schema_and_a_system_message_arrive(fake: FakeService, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_bytes(b'\xef\xbb\xbf{"const": "\xc3\xa9"}\n')
    assert flywheel(fake, "generate", "p", "--json-schema", str(schema), "--system", "Be kind.").returncode == 0
    messages = [Message(role="system", content="Be kind."), Message(role="user", content="p")]
    assert fake.requests == [GenerationRequest(messages=messages, max_tokens=128, json_schema='{"const": "é"}\n')]


def test_an_empty_regex_is_sent(fake: FakeService) -> None:
    assert flywheel(fake, "generate", "p", "--regex", "").returncode == 0
    assert fake.requests == [GenerationRequest(text="p", max_tokens=128, regex="")]


@pytest.mark.parametrize(
    "case",
    [
        (["--seed", "1", "--choice", "a"], "--seed, --choice"),
        *further([(["--system", "a"], "--system or --chat"), (["--chat"], "--system or --chat")]),
    ],
)
def test_an_old_server_is_sent_nothing_that_it_would_ignore(fake: FakeService, case: tuple[list[str], str]) -> None:
    arguments, options = case
    fake.supported_fields = ()
    process = flywheel(fake, "generate", "p", *arguments)
    message = f"flywheel: The server at {fake.address} is too old to know {options}, and would ignore it\n"
    assert (process.returncode, process.stdout, process.stderr.decode()) == (2, b"", message)
    assert not fake.requests
    assert flywheel(fake, "generate", "p", "--top-k", "5").returncode == 0


def test_logprobs_are_a_table_beside_the_text(fake: FakeService) -> None:
    fake.deltas = [delta(0, " Paris", 1), delta(0, "", 2, "stop")]
    for message, token in zip(fake.deltas, TOKENS, strict=True):
        message.tokens.append(token)
    process = flywheel(fake, "generate", "p", "--logprobs", "1")
    assert process.stdout == b" Paris"
    summary, *table = process.stderr.decode().splitlines()
    assert summary.startswith("2 tokens (prompt 5), stop")
    assert table == TABLE
    lines = on_terminal(fake, "generate", "p", "--logprobs", "1", NO_COLOR="1").decode().splitlines()
    assert lines[2:] == [*TABLE[:2], f"{TABLE[2][:79]}…"]


def test_json_has_all_of_the_tokens(fake: FakeService) -> None:
    fake.samples = [sample(" Paris")]
    fake.samples[0].seed = 9
    fake.samples[0].tokens.extend(TOKENS)
    printed = json.loads(flywheel(fake, "generate", "p", "--logprobs", "1", "--json").stdout)
    assert printed["seed"] == 9
    first, last = printed["tokens"]
    assert (first["id"], first["text"], first["bytes"]) == (5, " Paris", list(b" Paris"))
    assert first["logprob"] == pytest.approx(-0.105)
    assert [(it["id"], it["text"], it["bytes"]) for it in first["likeliest"]] == [
        (5, " Paris", list(b" Paris")),
        (6, "\ufffd", [0xE2, 0x82]),
    ]
    assert (last["id"], last["text"], len(last["likeliest"])) == (2, "", 8)


def test_the_text_of_a_token_cannot_pose_as_another_line() -> None:
    token = Token(1, b'a\nb"\\\x1b', -1.0, (LikelyToken(2, "\u2028".encode(), 0.5),))
    _, line = token_table([token], None)
    assert [*token_table([Token(1, "日本".encode(), -1.0)], 28)][1] == '  -1.000        36.8%  "日…'
    assert line == '  -1.000        36.8%  "a\\nb\\"\\\\\\u001b"  "\u2028" 100.0%'


def test_tokenize(fake: FakeService) -> None:
    process = flywheel(fake, "tokenize", "Once é")
    assert (process.returncode, process.stdout.decode()) == (0, '2 tokens\n0  "Once"\n1  "é"\n')
    assert flywheel(fake, "tokenize", stdin=b"one\r\n").stdout == b'1 tokens\n0  "one"\n'
    assert json.loads(flywheel(fake, "tokenize", "é", "--json").stdout) == {
        "prompt_tokens": 1,
        "tokens": [{"id": 0, "text": "é", "bytes": [0xC3, 0xA9]}],
    }


def test_tokenize_says_what_is_wrong(fake: FakeService) -> None:
    process = flywheel(fake, "tokenize", "")
    assert (process.returncode, process.stderr) == (2, b"flywheel: the prompt is empty\n")
    fake.fail(grpc.StatusCode.UNIMPLEMENTED, "the engine cannot tokenize by itself")
    process = flywheel(fake, "tokenize", "a")
    assert (process.returncode, process.stdout) == (1, b"")
    assert process.stderr.startswith(b"flywheel: UNIMPLEMENTED: the engine cannot tokenize by itself\n")
