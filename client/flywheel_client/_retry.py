"""Whether and when a call is tried again: the decisions that both clients share.

Nothing here waits, looks at a clock, or throws dice: `now` is the caller's, in seconds of `time.monotonic()`, and so is
`jitter`, a number of 0 to 1.
"""

from dataclasses import dataclass, field
from math import inf
from typing import Final

import grpc

from flywheel_client._errors import FlywheelError

SPREAD: Final = 0.2
"""By how much of itself a backoff is shorter or longer, so that clients that failed together do not return together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """How a call is tried again that failed before its first message.

    It is where the server was UNAVAILABLE, was full and said when to come back (RESOURCE_EXHAUSTED with `RetryInfo`), or
    stopped as the call arrived (CANCELLED). The wait is what the server asks for and a little more, or else a backoff that
    grows from one attempt to the next. One deadline holds for all attempts: where it would pass first, the call fails at once.

    Attributes:
        max_attempts: How often a call is made at most, the first time included.
        initial_backoff: The seconds before the second attempt, give or take a fifth.
        max_backoff: The longest backoff in seconds.
        multiplier: By how much a backoff is longer than the one before.
        max_delay: The longest wait in seconds that a server may ask for. Where it asks for more, the call fails at once, and
            the error's `retry_delay` says when to come back.
    """

    max_attempts: int = 5
    initial_backoff: float = 0.25
    max_backoff: float = 5.0
    multiplier: float = 2.0
    max_delay: float = 30.0

    def __post_init__(self) -> None:
        if (
            self.max_attempts < 1
            or self.multiplier < 1
            or min(self.initial_backoff, self.max_backoff) <= 0
            or self.max_delay < 0
        ):
            raise ValueError(f"max_attempts and multiplier must be at least 1, and backoffs greater than 0: {self}")


DEFAULT_RETRY: Final = Retry()


@dataclass(slots=True)
class Tries:
    """What one call has tried so far, and until when it may go on.

    Where a service has several endpoints, one attempt may try many of them; `failed`, `refused`, `error` and `may_reread` are
    about the attempt that is under way.
    """

    retry: Retry | None
    deadline: float
    wait_for_ready: bool
    """Whether to wait where there is no endpoint to try."""
    attempts: int = 1
    backoff: float = 0.0
    failed: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)
    error: Exception | None = None
    may_reread: bool = True

    @classmethod
    def begin(cls, retry: Retry | None, timeout: float | None, now: float, *, wait_for_ready: bool = False) -> "Tries":
        """Returns those of a call that begins now."""
        return cls(retry, inf if timeout is None else now + timeout, wait_for_ready)

    def remaining(self, now: float) -> float | None:
        """Returns the seconds until the deadline; None where there is none."""
        return None if self.deadline == inf else max(self.deadline - now, 0.0)

    def delay(self, error: FlywheelError, now: float, jitter: float, *, reached: bool = True) -> float | None:
        """Returns the seconds until the next attempt; None where there is to be none, so that the error stands.

        An attempt that has not `reached` any endpoint, as there was none to try, is another matter: waiting for one is not
        counted, and is done only where the caller wants to wait.
        """
        may_go_on = self.retry is not None and self.attempts < self.retry.max_attempts if reached else self.wait_for_ready
        if not may_go_on or not is_retryable(error):
            return None
        retry = self.retry or DEFAULT_RETRY
        backoff = min(self.backoff * retry.multiplier or retry.initial_backoff, retry.max_backoff)
        if error.retry_delay is None:
            delay = backoff * (1 - SPREAD + 2 * SPREAD * jitter)
        elif error.retry_delay <= retry.max_delay:
            delay = max(error.retry_delay, 0.0) + backoff * jitter
        else:
            return None
        if now + delay >= self.deadline:
            return None
        self.attempts += reached
        self.backoff = backoff
        self.failed.clear()
        self.refused.clear()
        self.error = None
        self.may_reread = True
        return delay


def is_retryable(error: FlywheelError) -> bool:
    """Whether a call that ended so, before its first message, may end better the next time."""
    match error.code:
        case grpc.StatusCode.UNAVAILABLE:
            return True
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return error.retry_delay is not None
        case grpc.StatusCode.CANCELLED:
            # Without a word of the service: grpc itself ends so what arrives at a server that stops.
            return not error.reason
        case _:
            return False
