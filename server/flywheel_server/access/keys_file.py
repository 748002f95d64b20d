"""Reads and writes the file with API keys. The file holds hashes, never a key."""

import hashlib
import os
import re
import secrets
import tempfile
from contextlib import suppress
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Final, Self

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    model_validator,
)
from pydantic_core import from_json

from flywheel_server.access.callers import Caller
from flywheel_server.access.identities import identity
from flywheel_server.int32 import INT32_MAX
from flywheel_server.system.regular_files import content_of

KEY_PREFIX: Final = "fw_"
"""The prefix of all keys. Scanners find keys that were published by mistake by it."""

RESERVED_NAMES: Final = "FLYWHEEL_API_KEYS-"
"""The prefix of the names of keys in the variable."""


def new_key() -> str:
    """Returns a new key of 256 random bits."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def hash_of(key: str) -> str:
    """Returns the hash of a key in the form of the file.

    A slow, salted hash is needed for passwords, because they can be guessed. 256 random bits cannot, so a fast hash is safe,
    and can be computed for each call.
    """
    return f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"


def _name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise ValueError("must be 1 to 64 letters, digits, dots, dashes and underscores, and begin with a letter or a digit")
    if name.startswith(RESERVED_NAMES):
        raise ValueError(f"must not begin with {RESERVED_NAMES}, as the names of the keys in the variable do")
    return name


def _hash(text: str) -> str:
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", text):
        raise ValueError("must be sha256: and 64 hexadecimal digits")
    return text


def _in_utc(time: datetime) -> datetime:
    try:
        return time.astimezone(UTC)
    except OverflowError:
        raise ValueError("must be within the years 1 to 9999 in UTC") from None


def _whole_seconds(time: datetime) -> str:
    return time.isoformat(timespec="seconds").replace("+00:00", "Z")


Name = Annotated[str, AfterValidator(_name)]
Hash = Annotated[str, AfterValidator(_hash)]
Identity = Annotated[str, AfterValidator(identity)]
Time = Annotated[AwareDatetime, AfterValidator(_in_utc), PlainSerializer(_whole_seconds)]
Priority = Annotated[int, Field(ge=-INT32_MAX, le=INT32_MAX)]
Quota = Annotated[int, Field(ge=1, le=INT32_MAX)]


class KeyEntry(BaseModel):
    """One caller, who has the key with this hash or a certificate with this identity."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)

    name: Name
    hash: Hash | None = Field(default=None, repr=False)
    certificate: Identity | None = None
    created: Time
    expires: Time | None = None
    priority: Priority = 0
    max_concurrent: Quota | None = None
    tokens_per_minute: Quota | None = None

    @model_validator(mode="after")
    def _has_one_credential(self) -> Self:
        if (self.hash is None) == (self.certificate is None):
            raise ValueError("must have either a hash or a certificate")
        return self

    def has_expired(self) -> bool:
        """Returns whether the entry has expired, so that new calls are refused."""
        return self.expires is not None and self.expires <= datetime.now(UTC)

    @cached_property
    def caller(self) -> Caller:
        """The caller with its priority and quotas."""
        return Caller(self.name, self.priority, self.max_concurrent, self.tokens_per_minute)


class KeysFile(BaseModel):
    """The entries of the file: `{"keys": [...]}`. No two have the same name, hash or certificate."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)

    keys: tuple[KeyEntry, ...]

    @model_validator(mode="after")
    def _has_no_duplicates(self) -> Self:
        for field in ("name", "hash", "certificate"):
            seen: dict[str, str] = {}
            for entry in self.keys:
                value = getattr(entry, field)
                if value in seen:
                    raise ValueError(f"{seen[value]} and {entry.name} have the same {field}")
                if value is not None:
                    seen[value] = entry.name
        return self

    @classmethod
    def parse(cls, text: bytes) -> Self:
        """Returns the parsed text. Raises `ValueError` with one line that names each invalid entry and field, but no value."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            problems = [
                _problem(text, item["loc"], item["msg"]) for item in error.errors(include_url=False, include_input=False)
            ]
        # Raised outside the `except` block, so that the error does not refer to the input: see `checked_request`.
        raise ValueError("; ".join(problems))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Returns the parsed file. Raises `OSError`, or `ValueError` as `parse` does."""
        return cls.parse(content_of(path))

    def with_entry(self, entry: KeyEntry) -> Self:
        """Returns a copy with one more entry. Raises `ValueError` if its name, hash or certificate is taken."""
        try:
            return type(self)(keys=(*self.keys, entry))
        except ValidationError as error:
            raise ValueError(_message(error.errors()[0]["msg"])) from None

    def without(self, name: str) -> Self:
        """Returns a copy without the entry of this name."""
        return type(self)(keys=tuple(entry for entry in self.keys if entry.name != name))

    def write(self, path: Path) -> None:
        """Replaces the file atomically, and keeps its mode and owner. Raises `OSError`.

        Only the owner can access a new file. If the path is a symbolic link, the target is replaced, and the link stays.
        """
        path = path.resolve()
        text = self.model_dump_json(indent=2, exclude_none=True) + "\n"
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                with suppress(FileNotFoundError):
                    _copy_mode_and_owner(path, file.fileno())
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink()
            raise
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _copy_mode_and_owner(path: Path, descriptor: int) -> None:
    old, new = path.stat(), os.fstat(descriptor)
    if (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid):
        os.fchown(descriptor, old.st_uid, old.st_gid)
    os.fchmod(descriptor, old.st_mode & 0o7777)


def _problem(text: bytes, location: tuple[int | str, ...], message: str) -> str:
    match location:
        case ("keys", int(index), *within):
            # Pydantic names the entry by its index only.
            entry = from_json(text)["keys"][index]
            name = f" ({entry['name']})" if isinstance(entry, dict) and _is_name(entry.get("name")) else ""
            where = [f"entry {index + 1}{name}", *map(_shown, within)]
        case _:
            where = [*map(_shown, location)]
    return ": ".join([*where, _message(message)])


def _shown(part: int | str) -> str:
    """Returns a part of a location, printable: an unknown field may have any name."""
    text = str(part)
    return text if text.isprintable() else ascii(text)


def _is_name(name: Any) -> bool:  # noqa: ANN401 - anything that JSON can be
    with suppress(TypeError, ValueError):
        return bool(_name(name))
    return False


def _message(message: str) -> str:
    return message.removeprefix("Value error, ")
