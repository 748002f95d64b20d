"""The command `flywheel-server keys`, and that servers understand what it writes."""

import asyncio
import json
import re
import sys
from asyncio.subprocess import PIPE
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from flywheel_server.access.callers import Caller
from flywheel_server.access.keys import HashedKey, KeyRing
from flywheel_server.access.keys_command import main
from flywheel_server.access.keys_file import KeysFile
from flywheel_server.errors import UnauthenticatedError

PROGRAM = "import sys; from flywheel_server.access.keys_command import main; main(sys.argv[1:])"


class Keys:
    """Runs the command on one file, in this process."""

    def __init__(self, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.path = path
        self._capsys = capsys

    def __call__(self, *arguments: str) -> str:
        main([*arguments, "--file", str(self.path)])
        out, self.err = self._capsys.readouterr()
        return out

    def fails(self, status: int, *arguments: str) -> str:
        with pytest.raises(SystemExit) as caught:
            self(*arguments)
        out, err = self._capsys.readouterr()
        assert not out
        if isinstance(caught.value.code, str):  # Python prints this text, and exits with 1
            assert status == 1
            return caught.value.code
        assert caught.value.code == status
        return err

    def ring(self) -> KeyRing:
        return KeyRing(file=str(self.path))


@pytest.fixture
def keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Keys:
    return Keys(tmp_path / "keys.json", capsys)


def test_create_prints_the_key_and_keeps_its_hash(keys: Keys) -> None:
    out = keys("create", "team-a", "--priority", "-2", "--max-concurrent", "8", "--tokens-per-minute", "60000")
    key = out.removesuffix("\n")
    assert re.fullmatch(r"fw_[A-Za-z0-9_-]{43}", key)
    assert "team-a" in keys.err
    assert key not in keys.err
    assert key not in keys.path.read_text()
    assert keys.path.stat().st_mode & 0o777 == 0o600
    assert keys.ring().caller_of_key(HashedKey.of(key)) == Caller("team-a", -2, 8, 60000)


def test_a_certificate_has_no_key(keys: Keys) -> None:
    assert keys("create", "mesh", "--certificate", "spiffe://cluster/mesh", "--max-concurrent", "2") == ""
    assert keys.ring().caller_of_certificate(["spiffe://cluster/mesh"]) == Caller("mesh", max_concurrent=2)
    assert "mesh and mesh-2 have the same certificate" in keys.fails(
        1, "create", "mesh-2", "--certificate", "spiffe://cluster/mesh"
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("12h", timedelta(hours=12)),
        ("30d", timedelta(days=30)),
        ("4w", timedelta(weeks=4)),
        ("2999-01-31", datetime(2999, 1, 31, tzinfo=UTC)),
        ("2999-01-31T12:00+02:00", datetime(2999, 1, 31, 10, tzinfo=UTC)),
    ],
)
def test_when_it_expires(given: str, expected: timedelta | datetime, keys: Keys) -> None:
    keys("create", "team-a", "--expires", given)
    (entry,) = KeysFile.read(keys.path).keys
    assert entry.expires is not None
    assert (
        entry.expires == expected
        if isinstance(expected, datetime)
        else abs(entry.expires - entry.created - expected).seconds < 2
    )


def test_revoke(keys: Keys) -> None:
    gone, stays = keys("create", "team-a").strip(), keys("create", "team-b").strip()
    assert not keys("revoke", "team-a")
    assert keys.ring().caller_of_key(HashedKey.of(stays)).name == "team-b"
    with pytest.raises(UnauthenticatedError):
        keys.ring().caller_of_key(HashedKey.of(gone))
    assert "team-a is not in" in keys.fails(1, "revoke", "team-a")
    assert keys("create", "team-a").strip() != gone


def test_list(keys: Keys) -> None:
    key = keys("create", "team-a", "--expires", "30d", "--max-concurrent", "8").strip()
    keys("create", "mesh", "--certificate", "spiffe://cluster/mesh", "--priority", "7")
    old = datetime.now(UTC) - timedelta(days=1)
    file = KeysFile.read(keys.path)
    expired = file.keys[1].model_copy(update={"expires": old})
    KeysFile(keys=(file.keys[0], expired)).write(keys.path)
    headings, team, mesh = keys("list").splitlines()
    assert re.split(" {2,}", headings)[:4] == ["NAME", "KIND", "CREATED", "EXPIRES"]
    assert re.split(" {2,}", team)[:2] + re.split(" {2,}", team)[4:] == ["team-a", "key", "0", "8", "-"]
    assert "(expired)" not in team
    assert f"{old:%Y-%m-%dT%H:%M:%SZ} (expired)" in mesh
    assert "certificate spiffe://cluster/mesh" in mesh
    text = keys("list", "--json")
    listed = json.loads(text)
    assert [(one["name"], one["certificate"], one["priority"], one["expired"]) for one in listed] == [
        ("team-a", None, 0, False),
        ("mesh", "spiffe://cluster/mesh", 7, True),
    ]
    assert key not in text
    assert "sha256" not in text


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["make", "x"],
        ["create"],
        ["create", "a name"],
        ["create", "FLYWHEEL_API_KEYS-1"],
        ["create", "x", "--expires", "tomorrow"],
        ["create", "x", "--expires", "2020-01-01"],
        ["create", "x", "--expires", "9" * 30 + "d"],
        ["create", "x", "--priority", "high"],
        ["create", "x", "--max-concurrent", "0"],
        ["create", "x", "--tokens-per-minute", "1.5"],
        ["create", "x", "--certificate", ""],
        ["list", "--file"],
    ],
)
def test_arguments_that_are_wrong(arguments: list[str], keys: Keys) -> None:
    assert "usage: flywheel-server keys" in keys.fails(2, *arguments)
    assert not keys.path.exists()


def test_which_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("FLYWHEEL_API_KEYS_FILE", raising=False)
    for arguments in (["list"], ["list", "--file", ""], ["create", "team-a", "--file", " "]):
        for variable in (None, "", " "):
            if variable is not None:
                monkeypatch.setenv("FLYWHEEL_API_KEYS_FILE", variable)
            with pytest.raises(SystemExit) as caught:
                main(arguments)
            assert caught.value.code == 2
            assert "FLYWHEEL_API_KEYS_FILE" in capsys.readouterr().err
    monkeypatch.setenv("FLYWHEEL_API_KEYS_FILE", str(tmp_path / "keys.json"))
    main(["create", "team-a"])
    assert [entry.name for entry in KeysFile.read(tmp_path / "keys.json").keys] == ["team-a"]


def test_a_failure_is_reported_in_one_line_and_changes_nothing(keys: Keys) -> None:
    for arguments in (["list"], ["revoke", "team-a"]):
        assert keys.fails(1, *arguments) == f"flywheel-server keys: {keys.path}: No such file or directory"
    keys("create", "team-a")
    before = keys.path.read_text()
    assert "team-a is taken" in keys.fails(1, "create", "team-a")
    assert keys.path.read_text() == before
    keys.path.write_text('{"keys": [{"name": "team-a"}]}')
    for arguments in (["list"], ["create", "team-b"], ["revoke", "team-a"]):
        message = keys.fails(1, *arguments)
        assert "entry 1 (team-a)" in message
        assert "\n" not in message
    assert keys.path.read_text() == '{"keys": [{"name": "team-a"}]}'
    keys.path = keys.path.parent / "nowhere" / "keys.json"
    assert "No such file" in keys.fails(1, "create", "team-a")


async def test_commands_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"

    async def create(name: str) -> tuple[str, str]:
        command: Any = [sys.executable, "-c", PROGRAM, "create", name, "--file", str(path)]
        process = await asyncio.create_subprocess_exec(*command, stdout=PIPE, stderr=PIPE)
        out, err = await process.communicate()
        assert process.returncode == 0, err
        return name, out.decode().strip()

    created = await asyncio.gather(*(create(f"team-{number}") for number in range(8)))
    ring = KeyRing(file=str(path))
    assert {ring.caller_of_key(HashedKey.of(key)).name for _, key in created} == {name for name, _ in created}
    assert all(ring.caller_of_key(HashedKey.of(key)).name == name for name, key in created)


async def test_it_is_a_command_of_the_server(tmp_path: Path) -> None:
    path = str(tmp_path / "keys.json")
    for arguments, status in ((["create", "team-a"], 0), (["create", "team-a"], 1)):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "flywheel_server", "keys", *arguments, "--file", path, stdout=PIPE, stderr=PIPE
        )
        out, err = await process.communicate()
        assert process.returncode == status
        assert b"Traceback" not in err
        assert bool(out) is (status == 0)
    assert KeysFile.read(Path(path)).keys[0].name == "team-a"
