"""Accepts callers by the keys in a variable, and by the keys and certificates in a file that is reloaded when it changes."""

import asyncio
import hmac
import secrets
from bisect import bisect_right
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path
from typing import Final, NamedTuple, Self

import structlog

from flywheel_server.access.callers import Caller
from flywheel_server.access.keys_file import RESERVED_NAMES, KeyEntry, KeysFile, hash_of
from flywheel_server.errors import UnauthenticatedError
from flywheel_server.system.reloading import Reloadable

log = structlog.stdlib.get_logger(__name__)

_LOOKUP_SECRET: Final = secrets.token_bytes(32)


class HashedKey(NamedTuple):
    """The hashes of a key that a caller has sent. The key itself is not kept.

    Attributes:
        hash: The hash of the key, in the form of the keys file.
        lookup: The dictionary key by which it is looked up.
    """

    hash: str
    lookup: bytes

    @classmethod
    def of(cls, key: str) -> Self:
        """Hashes a key."""
        key_hash = hash_of(key)
        return cls(key_hash, _lookup_of(key_hash))


class KeyRing:
    """The keys and certificates that are accepted now. Only the hashes of keys are kept.

    Arguments:
        keys: The keys of the variable. Their names are FLYWHEEL_API_KEYS-1 and so on, and they have no quotas.
        file: The file with further keys and certificates.

    Attributes:
        is_required: Whether callers need a key or certificate of the ring. If the file is empty, nobody may call.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is invalid.
    """

    def __init__(self, keys: Iterable[str] = (), file: str | None = None) -> None:
        created = datetime.now(UTC)
        self._fixed = tuple(
            KeyEntry.model_construct(name=f"{RESERVED_NAMES}{number}", hash=hash_of(key), created=created)
            for number, key in enumerate(keys, 1)
        )
        self._file = Reloadable("API keys", [path := Path(file)], lambda: _read(path)) if file is not None else None
        self._accepted = _Accepted.of((*self._fixed, *(self._file.first if self._file else ())))
        self.is_required: Final = bool(self._fixed) or self._file is not None

    def caller_of_key(self, key: HashedKey) -> Caller:
        """Returns the caller with this key. Raises `UnauthenticatedError` if the key is unknown or has expired."""
        entry = self._accepted.by_key.get(key.lookup)
        if entry is None or entry.hash is None or not hmac.compare_digest(entry.hash, key.hash):
            raise UnauthenticatedError("API_KEY_INVALID")
        return _unless_expired(entry)

    def caller_of_certificate(self, identities: Iterable[str]) -> Caller | None:
        """Returns the caller with the first identity that is listed; None if none is.

        Raises `UnauthenticatedError` if the caller's entry has expired.
        """
        by_certificate = self._accepted.by_certificate
        entry = next((by_certificate[identity] for identity in identities if identity in by_certificate), None)
        return _unless_expired(entry) if entry else None

    def next_to_expire(self, count: int) -> Sequence[tuple[float, str]]:
        """Returns the Unix time at which an entry expires, and its name, for the next `count` entries to expire."""
        expiries = self._accepted.expiries
        first = bisect_right(expiries, datetime.now(UTC).timestamp(), key=lambda expiry: expiry[0])
        return expiries[first : first + count]

    @asynccontextmanager
    async def following(self, on_revoked: Callable[[Collection[str]], None], interval: float = 1.0) -> AsyncIterator[None]:
        """Reloads the file whenever it changes, until the context ends. Checks it every `interval` seconds.

        `on_revoked` gets the names whose key or certificate was removed or replaced. If the file is invalid or cannot be read,
        the last valid content stays in use.
        """
        if (file := self._file) is None:
            yield
            return

        async def follow() -> None:
            loop = asyncio.get_running_loop()
            while True:
                await asyncio.sleep(interval)
                try:
                    entries = await loop.run_in_executor(reader, file.load_if_changed)
                    if entries is not None and (revoked := self._accept(entries)):
                        on_revoked(revoked)
                except Exception:
                    # Whatever it is, keep following: the next change may revoke a key.
                    log.exception("API keys not reloaded")

        # The thread is started now. If it could not be started later, the check would stay in the pool's queue and run together
        # with a later one: it would load the change, and nobody would await its result.
        reader = ThreadPoolExecutor(1, "API keys")
        reader.submit(lambda: None)
        following = asyncio.create_task(follow())
        try:
            yield
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            reader.shutdown(wait=False)

    def _accept(self, entries: Iterable[KeyEntry]) -> set[str]:
        before, self._accepted = self._accepted, _Accepted.of((*self._fixed, *entries))
        added = {name for name, *_ in self._accepted.credentials - before.credentials}
        revoked = {name for name, *_ in before.credentials - self._accepted.credentials}
        log.info("API keys reloaded", keys=len(self._accepted.credentials), added=sorted(added), revoked=sorted(revoked))
        return revoked


@dataclass(frozen=True, slots=True)
class _Accepted:
    by_key: Mapping[bytes, KeyEntry]
    by_certificate: Mapping[str, KeyEntry]
    expiries: Sequence[tuple[float, str]]
    """The Unix time at which each entry expires that does, and its name; the earliest first."""

    @classmethod
    def of(cls, entries: tuple[KeyEntry, ...]) -> Self:
        return cls(
            {_lookup_of(entry.hash): entry for entry in entries if entry.hash},
            {entry.certificate: entry for entry in entries if entry.certificate},
            sorted((entry.expires.timestamp(), entry.name) for entry in entries if entry.expires),
        )

    @property
    def credentials(self) -> set[tuple[str, str | None, str | None]]:
        entries = (*self.by_key.values(), *self.by_certificate.values())
        return {(entry.name, entry.hash, entry.certificate) for entry in entries}


def _lookup_of(key_hash: str) -> bytes:
    """Returns the dictionary key for the hash of an API key.

    The time of a look-up depends on the compared bytes. They are a hash with a secret of this process, so that callers cannot
    choose them, and timing reveals nothing.
    """
    return blake2b(key_hash.encode(), key=_LOOKUP_SECRET, digest_size=16).digest()


def _unless_expired(entry: KeyEntry) -> Caller:
    if entry.has_expired():
        raise UnauthenticatedError("API_KEY_EXPIRED")
    return entry.caller


def _read(file: Path) -> tuple[KeyEntry, ...]:
    try:
        return KeysFile.read(file).keys
    except OSError as error:
        raise OSError(f"FLYWHEEL_API_KEYS_FILE cannot be read ({file}): {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"FLYWHEEL_API_KEYS_FILE is wrong ({file}): {error}") from None
