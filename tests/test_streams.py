"""Both commands with each standard stream closed, full, gone, the wrong way round, or in another encoding than UTF-8."""

from pathlib import Path

import pytest

from tests.streams import COMMANDS, DELTAS, MODEL, SERVE, STATES, Command, Ran, expected, run, serving_text
from tests.thorough import further

TELLING = (
    ("flywheel model", "stdout", "ASCII"),
    ("flywheel --help", "stdout", "full"),
    ("flywheel generate", "stdin", "closed"),
    ("flywheel-server --help", "stdout", "closed"),
    ("flywheel-server keys create team-a --file keys.json", "stdout", "full"),
)
CASES = [(command, stream, state) for command in (*COMMANDS, SERVE) for stream in STATES for state in STATES[stream]]


def is_telling(case: tuple[Command, str, str]) -> bool:
    command, stream, state = case
    return (str(command), stream, state) in TELLING


@pytest.mark.parametrize(
    "case",
    [*filter(is_telling, CASES), *further(case for case in CASES if not is_telling(case))],
    ids=lambda case: " ".join(map(str, case)),
)
def test_a_command_ends_in_a_defined_way(case: tuple[Command, str, str], tmp_path: Path) -> None:
    command, stream, state = case
    with serving_text() as fake:
        ran = run(*case, fake.address, tmp_path)
    exit_code, message = expected(*case)
    assert ran.exit_code == exit_code, ran.err
    assert "Traceback" not in ran.err
    assert "Exception ignored" not in ran.err
    if stream not in {"stderr", "all"}:
        assert ran.err.endswith(message)
        assert bool(ran.err) or exit_code in {0, 141}, "nobody is told why"
    if stream in {"stdin", "stderr"} or state in {"ASCII", "latin-1"}:
        assert bool(ran.out) is (command.prints and exit_code == 0)
    if "create" in command.arguments and "--help" not in command.arguments:
        assert (tmp_path / "keys.json").exists() is (exit_code == 0), "an entry whose key nobody has"
    if state == "ASCII" and stream == "stdout":
        _assert_readable(command, ran)


def _assert_readable(command: Command, ran: Ran) -> None:
    shown = {"model": MODEL, "generate": DELTAS}.get(command.arguments[0], "")
    if not {"--help", "--json"} & set(command.arguments) and command.exit_code == 0:
        assert shown.encode("ascii", "backslashreplace").decode() in ran.out
