"""What the command `flywheel` shows on a terminal, and how it keeps the text of a model and a server apart from its own."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import grpc
import pytest
from flywheel_client import Delta, Endpoint, FieldViolation, InvalidArgumentError
from flywheel_client._terminal import Output, SampleWriter, describe, show_aside, show_endpoints, show_table

from tests.client.command import HIDDEN, delta, flywheel, on_terminal
from tests.thorough import further

if TYPE_CHECKING:
    from tests.client.conftest import FakeService


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
def test_a_terminal_gets_no_escape_sequence_if_none_is_wanted(fake: FakeService, variables: dict[str, str]) -> None:
    fake.deltas = [delta(0, "A", 1, "stop"), delta(1, "B", 1, "stop")]
    written = on_terminal(fake, "generate", "p", "-n", "2", **variables).decode()
    assert written.startswith("── sample 0 ──\nA\n\n── sample 1 ──\nB\nsample 0: 1 tokens")
    assert "\x1b" not in written


@pytest.mark.parametrize("arguments", further([["model"], ["stats"], ["stats", f"--{HIDDEN}"]]))
def test_a_terminal_gets_nothing_invisible_of_servers_and_arguments(fake: FakeService, arguments: list[str]) -> None:
    fake.model_name = HIDDEN
    if arguments == ["stats"]:
        fake.fail(grpc.StatusCode.INTERNAL, HIDDEN)
    written = on_terminal(fake, *arguments).decode()
    # Some versions of click quote an unknown option.
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
