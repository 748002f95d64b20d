"""Lets only callers with an API key through, where the server has any: `authorization: Bearer KEY` (RFC 6750)."""

import hashlib
import hmac
from collections.abc import Iterable
from typing import Any, Final

from flywheel_server.errors import UnauthenticatedError
from flywheel_server.interceptors.base import Call, CallInterceptor, Context

KEY: Final = "authorization"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


class AuthenticationInterceptor(CallInterceptor):
    """Raises `UnauthenticatedError` for a call without one of the keys. It holds only their hashes."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    async def around(self, call: Call, request: Any, context: Context) -> Any:  # noqa: ANN401 - any method's messages
        """Runs the call if its key is one of the server's."""
        sent = next((value for key, value in context.invocation_metadata() or () if key == KEY), "")
        scheme, _, key = str(sent).partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise UnauthenticatedError("API_KEY_MISSING")
        digest = _digest(key)
        # Every key is compared, in constant time each: how long it takes tells nothing about them.
        if not any([hmac.compare_digest(digest, known) for known in self._digests]):  # noqa: C419 - all, not the first
            raise UnauthenticatedError("API_KEY_INVALID")
        return await call(request, context)
