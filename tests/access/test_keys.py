"""The key ring: the callers that it accepts, errors in the keys file, and changes of the file."""

import asyncio
import json
import os
import threading
from collections.abc import Callable, Collection
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from flywheel_server.access.callers import Caller
from flywheel_server.access.keys import HashedKey, KeyRing
from flywheel_server.access.keys_file import KeyEntry, KeysFile, hash_of, new_key
from flywheel_server.errors import UnauthenticatedError
from structlog.testing import capture_logs

from tests.serving import until

KEY = new_key()
OTHER = new_key()
SPIFFE_ID = "spiffe://cluster.local/ns/apps/sa/mesh-b"
NOW = datetime.now(UTC)


def entry(name: str, key: str | None = KEY, **fields: Any) -> KeyEntry:
    return KeyEntry(name=name, hash=key and hash_of(key), created=NOW, **fields)


def write(path: Path, *entries: KeyEntry) -> str:
    KeysFile(keys=entries).write(path)
    return str(path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def test_a_file_that_was_written_by_hand(path: Path) -> None:
    team = {
        "name": "team-a",
        "hash": hash_of(KEY),
        "created": "2026-11-22T10:00:00Z",
        "expires": None,
        "priority": -3,
        "max_concurrent": 8,
        "tokens_per_minute": 60000,
    }
    mesh = {
        "name": "mesh-b",
        "certificate": SPIFFE_ID,
        "created": "2026-11-22T10:00:00+02:00",
        "expires": "2999-01-01T00:00:00Z",
    }
    path.write_text(json.dumps({"keys": [team, mesh]}))
    ring = KeyRing(file=str(path))
    assert ring.caller_of_key(HashedKey.of(KEY)) == Caller("team-a", priority=-3, max_concurrent=8, tokens_per_minute=60000)
    assert ring.caller_of_certificate(["unknown.example", SPIFFE_ID]) == Caller("mesh-b")
    assert ring.caller_of_certificate(["unknown.example"]) is None
    assert ring.caller_of_certificate([]) is None


CREATED = {"created": "2026-11-22T10:00:00Z"}
GOOD = {"name": "team-a", "hash": hash_of(KEY), **CREATED}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["JSON"]),
        ('{"keys": [', ["JSON"]),
        ("[" * 100_000, ["JSON"]),
        ("[]", ["object"]),
        ("{}", ["keys", "required"]),
        ('{"keys": {}}', ["keys", "array"]),
        ('{"keys": [5]}', ["entry 1", "object"]),
        ('{"keys": [], "more": 1}', ["more"]),
        ('{"keys": [{"name": 1}], "keys": 2}', ["keys"]),
        ([GOOD, {"name": "team-b", "hash": hash_of(OTHER)}], ["entry 2 (team-b)", "created", "required"]),
        ([{**GOOD, "hash": KEY}], ["entry 1 (team-a)", "hash", "64 hexadecimal digits"]),
        ([{**GOOD, "name": KEY + " "}], ["entry 1:", "name", "letters"]),
        ([{**GOOD, "name": "FLYWHEEL_API_KEYS-1"}], ["entry 1:", "name", "FLYWHEEL_API_KEYS-"]),
        ([{**GOOD, "created": "2026-11-22T10:00:00"}], ["team-a", "created", "timezone"]),
        ([{**GOOD, "expires": "soon"}], ["team-a", "expires"]),
        ([{**GOOD, "priority": "1"}], ["team-a", "priority", "integer"]),
        ([{**GOOD, "priority": True}], ["team-a", "priority", "integer"]),
        ([{**GOOD, "max_concurrent": 0}], ["team-a", "max_concurrent", "1"]),
        ([{**GOOD, "tokens_per_minute": 2**40, "max_concurrent": -1}], ["tokens_per_minute", "max_concurrent"]),
        ([{**GOOD, "max_conurrent": 1}], ["team-a", "max_conurrent"]),
        ([{"name": "team-a", **CREATED}], ["team-a", "either a hash or a certificate"]),
        ([{**GOOD, "certificate": SPIFFE_ID}], ["team-a", "either a hash or a certificate"]),
        ([{"name": "team-a", "certificate": "", **CREATED}], ["team-a", "certificate", "characters"]),
        ([GOOD, {**GOOD, "hash": hash_of(OTHER)}], ["team-a", "same name"]),
        ([GOOD, {**GOOD, "name": "team-b"}], ["team-a and team-b", "same hash"]),
    ],
)
def test_an_error_in_the_file_is_reported_in_one_line_without_a_secret(content: Any, words: list[str], path: Path) -> None:
    path.write_text(content if isinstance(content, str) else json.dumps({"keys": content}))
    with pytest.raises(ValueError, match="FLYWHEEL_API_KEYS_FILE") as caught:
        KeyRing(file=str(path))
    message = str(caught.value)
    for word in [str(path), *words]:
        assert word in message
    assert "\n" not in message
    assert KEY not in message
    assert hash_of(KEY) not in message


def test_a_file_that_is_not_there(path: Path) -> None:
    with pytest.raises(OSError, match=rf"FLYWHEEL_API_KEYS_FILE .*{path}.*: No such file"):
        KeyRing(file=str(path))


def test_a_path_that_is_no_regular_file(path: Path) -> None:
    os.mkfifo(path)
    for each, problem in (
        (path, "It is not a regular file"),
        (Path("/dev/zero"), "It is not"),
        (path.parent, "Is a directory"),
    ):
        with pytest.raises(OSError, match=f"FLYWHEEL_API_KEYS_FILE cannot be read .*: {problem}"):
            KeyRing(file=str(each))


def test_with_an_empty_file_nobody_may_call(path: Path) -> None:
    ring = KeyRing(file=write(path))
    assert ring.is_required
    with pytest.raises(UnauthenticatedError):
        ring.caller_of_key(HashedKey.of(KEY))


def test_the_keys_of_the_variable(path: Path) -> None:
    assert not KeyRing().is_required
    ring = KeyRing([KEY, OTHER])
    assert ring.is_required
    assert ring.caller_of_key(HashedKey.of(OTHER)) == Caller("FLYWHEEL_API_KEYS-2")
    with pytest.raises(UnauthenticatedError, match="API_KEY_INVALID"):
        ring.caller_of_key(HashedKey.of(KEY[:-1]))
    both = KeyRing([KEY, OTHER], write(path, entry("team-a", priority=1)))
    assert both.caller_of_key(HashedKey.of(KEY)) == Caller("team-a", priority=1)
    assert both.caller_of_key(HashedKey.of(OTHER)) == Caller("FLYWHEEL_API_KEYS-2")


def test_an_expired_credential_is_told_from_an_unknown_one(path: Path) -> None:
    past, future = NOW - timedelta(seconds=1), NOW + timedelta(days=1)
    old = entry("old", expires=past)
    mesh = entry("mesh", None, certificate=SPIFFE_ID, expires=past)
    ring = KeyRing(file=write(path, old, mesh, entry("new", OTHER, expires=future)))
    with pytest.raises(UnauthenticatedError, match="API_KEY_EXPIRED"):
        ring.caller_of_key(HashedKey.of(KEY))
    with pytest.raises(UnauthenticatedError, match="API_KEY_EXPIRED"):
        ring.caller_of_certificate([SPIFFE_ID])
    assert ring.caller_of_key(HashedKey.of(OTHER)).name == "new"


def test_no_representation_has_a_key_or_a_hash(path: Path) -> None:
    ring = KeyRing([OTHER], write(path, entry("team-a")))
    told = repr(ring) + repr(vars(ring)) + str(KeysFile.read(path))
    assert "team-a" in told
    for key in (KEY, OTHER):
        assert key not in told
        assert hash_of(key) not in told


def test_callers_cannot_choose_what_their_key_is_looked_up_by(path: Path) -> None:
    ring = KeyRing(file=write(path, entry("team-a")))
    (index,) = ring._accepted.by_key
    assert index != bytes.fromhex(hash_of(KEY).removeprefix("sha256:"))


def test_a_write_keeps_the_mode_and_the_link(tmp_path: Path) -> None:
    real = tmp_path / "real" / "keys.json"
    real.parent.mkdir()
    write(real, entry("team-a"))
    assert real.stat().st_mode & 0o777 == 0o600
    real.chmod(0o640)
    link = tmp_path / "keys.json"
    link.symlink_to(real)
    write(link, entry("team-b"))
    assert link.is_symlink()
    assert real.stat().st_mode & 0o777 == 0o640
    assert [one.name for one in KeysFile.read(real).keys] == ["team-b"]
    assert [file.name for file in real.parent.iterdir()] == ["keys.json"]


def test_a_write_that_fails_leaves_the_old_file_alone(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path, entry("team-a"))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write(path, entry("team-b"))
    assert [one.name for one in KeysFile.read(path).keys] == ["team-a"]
    assert [file.name for file in path.parent.iterdir()] == ["keys.json"]


class Follower:
    """Records the names that are revoked, and looks up callers in the ring."""

    def __init__(self, ring: KeyRing) -> None:
        self.ring = ring
        self.revoked: list[Collection[str]] = []

    def name_of(self, key: str) -> str | None:
        try:
            return self.ring.caller_of_key(HashedKey.of(key)).name
        except UnauthenticatedError:
            return None


async def test_a_key_that_is_added_is_accepted_and_one_that_is_gone_is_revoked(path: Path) -> None:
    ring = KeyRing(file=write(path, entry("team-a")))
    follower = Follower(ring)
    with capture_logs() as logs:
        async with ring.following(follower.revoked.append, 0.01):
            write(path, entry("team-a"), entry("team-b", OTHER))
            await until(lambda: follower.name_of(OTHER) == "team-b", "team-b is accepted")
            assert follower.name_of(KEY) == "team-a"
            write(path, entry("team-b", OTHER, priority=5, expires=NOW))
            await until(lambda: follower.name_of(KEY) is None, "team-a is refused")
            await until(lambda: bool(follower.revoked), "team-a is reported as revoked")
    # team-b keeps its key: other quotas and an expiry apply only to later calls.
    assert follower.revoked == [{"team-a"}]
    reloads = [(log["keys"], log["added"], log["revoked"]) for log in logs]
    assert reloads == [(2, ["team-b"], []), (1, [], ["team-a"])]


async def test_a_name_that_stands_for_another_key_is_revoked(path: Path) -> None:
    mesh = entry("mesh", None, certificate=SPIFFE_ID)
    ring = KeyRing([new_key()], write(path, entry("team-a"), mesh))
    follower = Follower(ring)
    async with ring.following(follower.revoked.append, 0.01):
        write(path, entry("team-a", OTHER), mesh)
        await until(lambda: follower.revoked == [{"team-a"}], "team-a is revoked")
        assert (follower.name_of(KEY), follower.name_of(OTHER)) == (None, "team-a")
        write(path, entry("team-a", OTHER), entry("mesh", None, certificate="spiffe://cluster/other"))
        await until(lambda: follower.revoked == [{"team-a"}, {"mesh"}], "mesh is revoked")
        assert ring.caller_of_certificate([SPIFFE_ID]) is None


def spoil(path: Path) -> None:
    """Replaces the file atomically by an invalid one."""
    wrong = path.with_name("wrong.json")
    wrong.write_text(f'{{"keys": [{{"name": "team-a", "hash": "{KEY}"}}]}}')
    wrong.replace(path)


def replace_by_a_pipe(path: Path) -> None:
    pipe = path.with_name("pipe")
    os.mkfifo(pipe)
    pipe.replace(path)


@pytest.mark.parametrize("harm", [spoil, Path.unlink, replace_by_a_pipe])
async def test_a_file_with_something_wrong_changes_nothing_and_is_logged_once(harm: Callable[[Path], None], path: Path) -> None:
    ring = KeyRing(file=write(path, entry("team-a")))
    follower = Follower(ring)
    looks = 0
    look = ring._file.load_if_changed  # type: ignore[union-attr]

    def counting() -> Any:
        nonlocal looks
        looks += 1
        return look()

    ring._file.load_if_changed = counting  # type: ignore[union-attr,method-assign]
    with capture_logs() as logs:
        async with ring.following(follower.revoked.append, 0.01):
            harm(path)
            await until(lambda: bool(logs), "it is logged")
            after = looks
            await until(lambda: looks > after + 5, "it was looked at again")
            assert [log["log_level"] for log in logs] == ["error"]
            assert follower.name_of(KEY) == "team-a"
            write(path, entry("team-b", OTHER))
            await until(lambda: follower.revoked == [{"team-a"}], "it is followed again")
    assert follower.name_of(OTHER) == "team-b"
    assert KEY not in str(logs)


async def test_an_error_of_the_callback_does_not_end_the_following(path: Path) -> None:
    ring = KeyRing(file=write(path, entry("team-a")))
    follower = Follower(ring)

    def fail_once(names: Collection[str]) -> None:
        follower.revoked.append(names)
        if len(follower.revoked) == 1:
            raise RuntimeError("a bug")

    with capture_logs() as logs:
        async with ring.following(fail_once, 0.01):
            write(path, entry("team-b", OTHER))
            await until(lambda: len(follower.revoked) == 1, "team-a is revoked")
            write(path)
            await until(lambda: len(follower.revoked) == 2, "team-b is revoked")
    assert [log["log_level"] for log in logs] == ["info", "error", "info"]


def test_a_change_is_followed_while_no_thread_can_be_started(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def follow() -> None:
        ring = KeyRing(file=write(path, entry("team-a")))
        follower = Follower(ring)
        async with ring.following(follower.revoked.append, 0.01):
            with monkeypatch.context() as poor:
                poor.setattr(threading.Thread, "start", start)
                write(path, entry("team-b", OTHER))
                # The thread that reads the file runs already: nothing attempts to start a thread here.
                await until(lambda: follower.revoked == [{"team-a"}], "team-a is revoked", 5)

    # On a loop of its own, which has no threads yet.
    asyncio.run(follow())


async def test_a_secret_that_kubernetes_mounts_is_followed(tmp_path: Path) -> None:
    for version, one in (("1", entry("team-a")), ("2", entry("team-b", OTHER))):
        (tmp_path / version).mkdir()
        write(tmp_path / version / "keys.json", one)
    (tmp_path / "..data").symlink_to("1")
    (tmp_path / "keys.json").symlink_to("..data/keys.json")
    ring = KeyRing(file=str(tmp_path / "keys.json"))
    follower = Follower(ring)
    async with ring.following(follower.revoked.append, 0.01):
        (tmp_path / "..data_tmp").symlink_to("2")
        (tmp_path / "..data_tmp").rename(tmp_path / "..data")
        await until(lambda: follower.revoked == [{"team-a"}], "the new file is read")
    assert follower.name_of(OTHER) == "team-b"
