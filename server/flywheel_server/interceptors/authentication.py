"""Finds out who calls, and lets only those through who may.

A key is sent as `authorization: Bearer KEY` (RFC 6750). A certificate is that of the client in mutual TLS.
"""

import re
from typing import Final, NamedTuple

import structlog

from flywheel_server.access.callers import ANYBODY, Caller, caller
from flywheel_server.access.client_certificates import identities_of
from flywheel_server.access.keys import HashedKey, KeyRing
from flywheel_server.errors import UnauthenticatedError
from flywheel_server.grpc_types import GrpcContext
from flywheel_server.interceptors.metadata import CallMetadata

_BEARER: Final = re.compile(r"bearer +(.*)", re.IGNORECASE | re.DOTALL)
_VISIBLE_ASCII: Final = re.compile(r"[\x21-\x7e]+")


class Credentials(NamedTuple):
    """What a caller shows of itself: the names in its certificate, and its key if it sent one."""

    identities: tuple[str, ...]
    key: HashedKey | None


class Authentication:
    """Raises `UnauthenticatedError` for a call that has neither a key nor a certificate of the ring.

    Where the ring is not required, everybody may call: mutual TLS has turned away who has no certificate.

    Arguments:
        keys: The ring.
        certificates: Whether clients show certificates, which is so in mutual TLS only.
    """

    def __init__(self, keys: KeyRing, *, certificates: bool) -> None:
        self._keys = keys
        self._certificates = certificates

    def identify(self, context: GrpcContext, metadata: CallMetadata) -> Credentials:
        """Makes the call its caller's, and returns what the caller was identified by."""
        # First of all: one that is not what it seems is refused, whatever else the call has.
        identities = identities_of(context.auth_context()) if self._certificates else ()
        key = _key(metadata.authorization) if self._keys.is_required else None
        credentials = Credentials(identities, HashedKey.of(key) if key is not None else None)
        self._set_caller(credentials)
        return credentials

    def confirm(self, credentials: Credentials) -> None:
        """Looks the caller of a running call up again. Raises `UnauthenticatedError` if that caller may no longer call."""
        try:
            self._set_caller(credentials)
        except UnauthenticatedError as error:
            if error.reason == "API_KEY_EXPIRED":
                raise
            raise UnauthenticatedError("API_KEY_REVOKED") from error

    def _set_caller(self, credentials: Credentials) -> None:
        who = self._caller_of(credentials)
        if who is caller.get():
            return
        caller.set(who)
        if who.name:
            # Until the call has ended, which is a task of its own: the line that says how it ended names the caller too.
            structlog.contextvars.bind_contextvars(caller=who.name)

    def _caller_of(self, credentials: Credentials) -> Caller:
        identities, key = credentials.identities, credentials.key
        if not self._keys.is_required:
            return Caller(identities[0]) if identities else ANYBODY
        if key is not None:
            return self._keys.caller_of_key(key)
        listed = self._keys.caller_of_certificate(identities)
        if listed is None:
            raise UnauthenticatedError("API_KEY_MISSING")
        return listed


def _key(sent: tuple[str | bytes, ...]) -> str | None:
    """Returns the key of the call; None where it has none; raises `UnauthenticatedError` for what cannot be one."""
    if len(sent) > 1:
        # Which of them counts is for nobody to guess: proxies and servers may guess differently.
        raise UnauthenticatedError("API_KEY_INVALID")
    bearer = _BEARER.fullmatch(sent[0]) if sent and isinstance(sent[0], str) else None
    if bearer is None or not bearer[1]:
        return None
    if not _VISIBLE_ASCII.fullmatch(bearer[1]):
        raise UnauthenticatedError("API_KEY_INVALID")
    return bearer[1]
