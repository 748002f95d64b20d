"""Passes the trace of a call on to other services, without a library of tracing: engines import this module."""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Final

inject_headers: Final[ContextVar[Callable[[dict[str, str]], None] | None]] = ContextVar("inject_headers", default=None)
"""Adds the headers of the running call's trace to a dictionary; None if the call is not traced."""


def trace_headers() -> dict[str, str]:
    """Returns the headers, such as `traceparent` (W3C Trace Context), for a request on behalf of the call that runs.

    Empty if the call is not traced.
    """
    headers: dict[str, str] = {}
    if (inject := inject_headers.get()) is not None:
        inject(headers)
    return headers
