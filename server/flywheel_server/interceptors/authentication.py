"""Authenticates the caller of each call, by API key or by client certificate.

A key is sent as `authorization: Bearer KEY` (RFC 6750). A client shows a certificate in mutual TLS.
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
from flywheel_server.telemetry.calls import current_call

_BEARER: Final = re.compile(r"bearer +(.*)", re.IGNORECASE | re.DOTALL)
_VISIBLE_ASCII: Final = re.compile(r"[\x21-\x7e]+")


class Credentials(NamedTuple):
    """What a caller sends to authenticate itself: the names in its certificate, and its key, or None without a key."""

    identities: tuple[str, ...]
    key: HashedKey | None


class Authentication:
    """Refuses calls with `UnauthenticatedError` unless the key ring knows their key or their certificate.

    If the key ring is not required, everybody may call. In mutual TLS, TLS itself refuses clients without a certificate.

    Arguments:
        keys: The key ring.
        certificates: Whether clients show certificates, as in mutual TLS.
    """

    def __init__(self, keys: KeyRing, *, certificates: bool) -> None:
        self._keys = keys
        self._certificates = certificates

    def identify(self, context: GrpcContext, metadata: CallMetadata) -> Credentials:
        """Sets the caller of the call, and returns its credentials. Raises `UnauthenticatedError`."""
        # First, because an invalid certificate is refused even if the call has a valid key.
        identities = identities_of(context.auth_context()) if self._certificates else ()
        key = _key(metadata.authorization) if self._keys.is_required else None
        credentials = Credentials(identities, HashedKey.of(key) if key is not None else None)
        self._set_caller(credentials)
        return credentials

    def confirm(self, credentials: Credentials) -> None:
        """Authenticates a running call again. Raises `UnauthenticatedError` if its key or certificate is no longer accepted."""
        try:
            self._set_caller(credentials)
        except UnauthenticatedError as error:
            if error.reason == "API_KEY_EXPIRED":
                raise
            raise UnauthenticatedError("API_KEY_REVOKED") from error

    def _set_caller(self, credentials: Credentials) -> None:
        found = self._caller_of(credentials)
        if found is caller.get():
            return
        caller.set(found)
        if found.name:
            if call := current_call.get():
                call.caller = found.name
            # For all log lines of this call, whose task has a context of its own.
            structlog.contextvars.bind_contextvars(caller=found.name)

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
    """Returns the key in the `authorization` values, or None. Raises `UnauthenticatedError` if a value cannot be a key."""
    if len(sent) > 1:
        # A proxy might check one of them, and this server another.
        raise UnauthenticatedError("API_KEY_INVALID")
    bearer = _BEARER.fullmatch(sent[0]) if sent and isinstance(sent[0], str) else None
    if bearer is None or not bearer[1]:
        return None
    if not _VISIBLE_ASCII.fullmatch(bearer[1]):
        raise UnauthenticatedError("API_KEY_INVALID")
    return bearer[1]
