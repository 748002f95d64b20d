"""Finds out who calls, and lets only those through who may.

A key is sent as `authorization: Bearer KEY` (RFC 6750). A certificate is that of the client in mutual TLS.
"""

import re
from typing import Final

import structlog

from flywheel_server.callers import ANYBODY, Caller, caller
from flywheel_server.client_certificates import identities_of
from flywheel_server.errors import UnauthenticatedError
from flywheel_server.interceptors.base import Call, CallInterceptor, Context
from flywheel_server.interceptors.public import is_public
from flywheel_server.keys import KeyRing

KEY: Final = "authorization"
_BEARER: Final = re.compile(r"bearer +(.*)", re.IGNORECASE | re.DOTALL)
_VISIBLE: Final = re.compile(r"[\x21-\x7e]+")


class AuthenticationInterceptor(CallInterceptor):
    """Raises `UnauthenticatedError` for a call that has neither a key nor a certificate of the ring.

    Where the ring is not required, everybody may call: mutual TLS has turned away who has no certificate.
    """

    def __init__(self, keys: KeyRing) -> None:
        self._keys = keys

    def covers(self, method: str) -> bool:
        """Returns whether the method needs authentication."""
        return not is_public(method)

    async def around(self, call: Call, context: Context) -> None:
        """Runs the call as its caller."""
        self._identify(context)
        await call(context)

    def confirm(self, context: Context) -> None:
        """Looks the caller of a running call up again. Raises `UnauthenticatedError` if that caller may no longer call."""
        try:
            self._identify(context)
        except UnauthenticatedError as error:
            if error.reason == "API_KEY_EXPIRED":
                raise
            raise UnauthenticatedError("API_KEY_REVOKED") from error

    def _identify(self, context: Context) -> None:
        who = self._caller_of(context)
        caller.set(who)
        if who.name:
            # Until the call has ended, which is a task of its own: the line that says how it ended names the caller too.
            structlog.contextvars.bind_contextvars(caller=who.name)

    def _caller_of(self, context: Context) -> Caller:
        # First of all: one that is not what it seems is refused, whatever else the call has.
        identities = identities_of(context.auth_context())
        if not self._keys.is_required:
            return Caller(identities[0]) if identities else ANYBODY
        key = _key(context)
        if key is not None:
            return self._keys.caller_of_key(key)
        listed = self._keys.caller_of_certificate(identities)
        if listed is None:
            raise UnauthenticatedError("API_KEY_MISSING")
        return listed


def _key(context: Context) -> str | None:
    """Returns the key of the call; None where it has none; raises `UnauthenticatedError` for what cannot be one."""
    sent = [value for key, value in context.invocation_metadata() or () if key == KEY]
    if len(sent) > 1:
        # Which of them counts is for nobody to guess: proxies and servers may guess differently.
        raise UnauthenticatedError("API_KEY_INVALID")
    bearer = _BEARER.fullmatch(sent[0]) if sent and isinstance(sent[0], str) else None
    if bearer is None or not bearer[1]:
        return None
    if not _VISIBLE.fullmatch(bearer[1]):
        raise UnauthenticatedError("API_KEY_INVALID")
    return bearer[1]
