"""The command `flywheel-server keys`: creates, lists and revokes the keys in a server's keys file."""

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

from flywheel_server.access.keys_file import Identity, KeyEntry, KeysFile, Name, Priority, Quota, hash_of, new_key
from flywheel_server.setting_texts import is_blank

FILE_VARIABLE: Final = "FLYWHEEL_API_KEYS_FILE"
_UNITS: Final = {"h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}


def main(arguments: Sequence[str]) -> None:
    """Runs the command with the arguments after `keys`. Exits with 1 if it fails, and with 2 if the arguments are wrong."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if is_blank(given.file):
        parser.error(f"which file? Give --file, or set {FILE_VARIABLE}")
    try:
        given.run(Path(given.file), given)
    except OSError as error:
        sys.exit(f"{parser.prog}: {given.file}: {error.strerror}")
    except ValueError as error:
        sys.exit(f"{parser.prog}: {error}")


def _create(path: Path, given: argparse.Namespace) -> None:
    key = None if given.certificate else new_key()
    entry = KeyEntry(
        name=given.name,
        hash=hash_of(key) if key else None,
        certificate=given.certificate,
        created=datetime.now(UTC),
        expires=given.expires,
        priority=given.priority,
        max_concurrent=given.max_concurrent,
        tokens_per_minute=given.tokens_per_minute,
    )
    with _locked(path):
        file = _read(path) if path.exists() else KeysFile(keys=())
        if any(other.name == entry.name for other in file.keys):
            raise ValueError(f"{entry.name} is taken; revoke it first, or choose another name")
        if key:
            # Alone on standard output, for scripts. Before the file is written: if this fails, no entry has a lost key.
            sys.stdout.write(f"{key}\n")
            sys.stdout.flush()
        try:
            file.with_entry(entry).write(path)
        except OSError:
            sys.stderr.write(f"{entry.name} was not created{', and its key is of no use' if key else ''}\n")
            raise
    sys.stderr.write(f"created {entry.name} in {path}{'; its key is shown this once' if key else ''}\n")


def _list(path: Path, given: argparse.Namespace) -> None:
    entries = _read(path).keys
    if given.json:
        listed = [{**entry.model_dump(mode="json", exclude={"hash"}), "expired": entry.has_expired()} for entry in entries]
        sys.stdout.write(json.dumps(listed, indent=2) + "\n")
    else:
        sys.stdout.write(_table([_HEADINGS, *map(_row, entries)]))


def _revoke(path: Path, given: argparse.Namespace) -> None:
    with _locked(path):
        file = _read(path)
        left = file.without(given.name)
        if left == file:
            raise ValueError(f"{given.name} is not in {path}")
        left.write(path)
    sys.stderr.write(f"revoked {given.name} in {path}; servers end its calls when they see it\n")


_HEADINGS: Final = ("NAME", "KIND", "CREATED", "EXPIRES", "PRIORITY", "MAX CONCURRENT", "TOKENS PER MINUTE")


def _row(entry: KeyEntry) -> tuple[str, ...]:
    texts = entry.model_dump(mode="json")
    return (
        entry.name,
        f"certificate {entry.certificate}" if entry.certificate else "key",
        texts["created"],
        f"{texts['expires'] or '-'}{' (expired)' if entry.has_expired() else ''}",
        str(entry.priority),
        str(entry.max_concurrent or "-"),
        str(entry.tokens_per_minute or "-"),
    )


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n" for row in rows
    )


def _read(path: Path) -> KeysFile:
    try:
        return KeysFile.read(path)
    except ValueError as error:
        raise ValueError(f"{path} is wrong: {error}") from None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keeps other commands from changing the file until the context ends.

    Locks a file of its own, which stays. The keys file is replaced by each change, and a lock on it would be lost.
    """
    import fcntl  # imported here, because Windows does not have it

    path = path.resolve()
    descriptor = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flywheel-server keys",
        description="Creates, lists and revokes the keys in a server's keys file. The file holds hashes, and no keys.",
        allow_abbrev=False,
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--file", default=os.environ.get(FILE_VARIABLE), help=f"The file with the keys. Default: the variable {FILE_VARIABLE}"
    )
    commands = parser.add_subparsers(required=True, metavar="create|list|revoke")

    def command(name: str, run: Any, description: str) -> argparse.ArgumentParser:  # noqa: ANN401 - one of the functions above
        one = commands.add_parser(name, parents=[common], help=description, description=description, allow_abbrev=False)
        one.set_defaults(run=run)
        return one

    create = command("create", _create, "Creates a key and prints it, once. Creates the file if there is none.")
    create.add_argument("name", type=_valid(Name), help="The name of the caller, in the log and in quotas.")
    create.add_argument(
        "--expires",
        type=_time,
        metavar="WHEN",
        help="When the key expires: in hours, days or weeks from now (12h, 30d, 4w), or at the start of a day in UTC "
        "(2027-01-31). Then new calls are refused. Default: never",
    )
    create.add_argument(
        "--priority", type=_valid(Priority), default=0, metavar="N", help="Higher priorities are served first. Default: 0"
    )
    create.add_argument("--max-concurrent", type=_valid(Quota), metavar="N", help="Samples that may wait or run at a time.")
    create.add_argument("--tokens-per-minute", type=_valid(Quota), metavar="N", help="Tokens of prompts and samples together.")
    create.add_argument(
        "--certificate",
        type=_valid(Identity),
        metavar="IDENTITY",
        help="Creates no key: the caller is identified by a client certificate with this URI (such as a SPIFFE ID), host name "
        "or, in a certificate without alternative names, common name.",
    )
    listing = command("list", _list, "Prints all callers.")
    listing.add_argument("--json", action="store_true", help="Prints them as JSON.")
    revoke = command("revoke", _revoke, "Removes a caller. Servers refuse its calls, and end its running calls.")
    revoke.add_argument("name", help="The name of the caller.")
    return parser


def _valid(kind: Any) -> Any:  # noqa: ANN401 - any type that an entry's field has
    """Returns a function that validates an argument as this type, with errors that argparse shows."""
    adapter: TypeAdapter[Any] = TypeAdapter(kind)

    def convert(text: str) -> Any:  # noqa: ANN401 - a value of the type
        try:
            return adapter.validate_python(text)
        except ValidationError as error:
            raise argparse.ArgumentTypeError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None

    return convert


def _time(text: str) -> datetime:
    now = datetime.now(UTC)
    try:
        if period := re.fullmatch(r"([0-9]+)([hdw])", text):
            time = now + int(period[1]) * _UNITS[period[2]]
        else:
            time = datetime.fromisoformat(text)
            time = time if time.tzinfo else time.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError("must be like 12h, 30d, 4w or 2027-01-31") from None
    if time <= now:
        raise argparse.ArgumentTypeError("is in the past")
    return time
