"""Who calls, and what that caller may have."""

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Caller:
    """A caller, by the name of its API key or certificate.

    Attributes:
        name: Unique among the callers of a server; empty if callers are not told apart.
        priority: Waiting calls are served by priority, highest first.
        max_concurrent: Samples that may be waiting and under way at a time; None is no limit.
        tokens_per_minute: Tokens of prompts and samples together; None is no limit.
    """

    name: str
    priority: int = 0
    max_concurrent: int | None = None
    tokens_per_minute: int | None = None


ANYBODY: Final = Caller("")

caller: ContextVar[Caller] = ContextVar("caller", default=ANYBODY)
"""Whose call runs in this context."""
