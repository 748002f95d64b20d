"""Defines callers, their priority and their quotas."""

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Caller:
    """A caller, identified by the name of its API key or certificate.

    Attributes:
        name: Unique among the callers of a server; empty if the server does not distinguish callers.
        priority: Waiting calls are served by priority, highest first.
        max_concurrent: Samples that may wait or run at a time; None if unlimited.
        tokens_per_minute: Tokens of prompts and samples together; None if unlimited.
    """

    name: str
    priority: int = 0
    max_concurrent: int | None = None
    tokens_per_minute: int | None = None


ANYBODY: Final = Caller("")

caller: ContextVar[Caller] = ContextVar("caller", default=ANYBODY)
"""The caller whose call runs in this context."""
