"""Decides whether and when to retry a call, for both clients.

Nothing here waits, reads a clock or draws random numbers: callers pass `now`, in seconds of `time.monotonic()`, and `jitter`, a
random number from 0 to 1.
"""

from dataclasses import dataclass, field
from math import inf
from numbers import Integral, Real
from typing import Final

import grpc

from flywheel_client._errors import FlywheelError, UnavailableError
from flywheel_client._timeouts import seconds_of

BACKOFF_JITTER: Final = 0.2
"""The fraction by which a backoff varies, so that clients that failed together do not retry together."""

NO_CONNECTION_MESSAGES: Final = ("failed to connect to all addresses", "DNS resolution failed", "errors resolving")
"""How grpc's message begins if grpc could not connect to an address."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """How to retry a call that failed before the engine began on it.

    The server sends the headers of its answer (initial metadata) when the engine begins. Once they have arrived, a call is
    never retried, even if no result has arrived: this is the rule of gRPC's own retries (gRFC A6). Before that, a call is
    retried in these cases:

    - The server was UNAVAILABLE.
    - The server was full and said when to try again (RESOURCE_EXHAUSTED with `RetryInfo`).
    - The server stopped as the call arrived (CANCELLED).
    - Something between client and server ended the call (INTERNAL or UNKNOWN without a reason of the server).

    The delay before an attempt is a little more than the server asks for, or else a backoff that grows from attempt to
    attempt. One deadline covers all attempts: if it would pass during the delay, the call fails at once.

    Attributes:
        max_attempts: How often a call is sent at most, including the first time, to all endpoints of a directory together. If a
            connection breaks before the headers have arrived, the client cannot know whether the engine had begun. So this is
            also how often the engine may begin on a call, and how many servers a call may crash. Addresses of a directory that
            cannot be connected to do not count; only if none can be connected to, they count as one attempt together.
        initial_backoff: The seconds before the second attempt, plus or minus a fifth.
        max_backoff: The longest backoff in seconds; may be infinite.
        multiplier: The factor from one backoff to the next.
        max_delay: The longest delay in seconds that a server may ask for. If a server asks for more, the call fails at once,
            and the error's `retry_delay` says when to try again. Infinity accepts any delay.
    """

    max_attempts: int = 5
    initial_backoff: float = 0.25
    max_backoff: float = 5.0
    multiplier: float = 2.0
    max_delay: float = 30.0

    def __post_init__(self) -> None:
        """Raises `TypeError` for a value of another type, and `ValueError` for one out of range."""
        for name in ("initial_backoff", "max_backoff", "max_delay"):
            object.__setattr__(self, name, seconds_of(name, getattr(self, name)))
        for name, kind in (("max_attempts", Integral), ("multiplier", Real)):
            if not isinstance(getattr(self, name), kind) or isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a number, not {getattr(self, name)!r}")
        backoffs = self.initial_backoff > 0 and self.max_backoff > 0
        if not (self.max_attempts >= 1 and self.multiplier >= 1 and backoffs and self.max_delay >= 0):
            raise ValueError(
                f"max_attempts and multiplier must be at least 1, backoffs greater than 0, and max_delay 0 or more: {self}"
            )


DEFAULT_RETRY: Final = Retry()


@dataclass(slots=True)
class Tries:
    """The tries of one call so far, and its deadline.

    If a service has several endpoints, a call tries one after another without a delay. The tries between two delays are a
    round. `counted`, `failed`, `error` and `may_reread` are about the current round.
    """

    retry: Retry | None
    deadline: float
    """In seconds of `time.monotonic()`; infinity if there is none."""
    wait_for_ready: bool
    """Whether to wait if there is no endpoint to try."""
    attempts: int = 0
    """The failed attempts: each try that was sent, and each round in which no try was sent."""
    counted: bool = False
    """Whether the current round is counted in `attempts`."""
    backoff: float = 0.0
    """The last backoff in seconds."""
    failed: set[str] = field(default_factory=set)
    """The addresses that have failed, and are not tried again, in this round."""
    error: Exception | None = None
    """Why the last try of this round failed, or why no endpoint answered."""
    may_reread: bool = True
    """Whether the directory may be read again in this round."""

    @classmethod
    def begin(cls, retry: Retry | None, timeout: float | None, now: float, *, wait_for_ready: bool = False) -> "Tries":
        """Returns the tries of a call that begins now."""
        return cls(retry, inf if timeout is None else now + timeout, wait_for_ready)

    def remaining(self, now: float) -> float | None:
        """Returns the seconds until the deadline; None if there is none."""
        return None if self.deadline == inf else max(self.deadline - now, 0.0)

    def delay(
        self, error: FlywheelError, now: float, jitter: float, *, tried: bool = True, to_blame: bool = False
    ) -> float | None:
        """Returns the seconds until the next try; None to give up and raise the error.

        Args:
            error: Why the last try failed, before the engine began.
            now: The current time in seconds of `time.monotonic()`.
            jitter: A random number from 0 to 1.
            tried: Whether there was an endpoint to try. Waiting for an endpoint is not an attempt, and is done only if the call
                has `wait_for_ready`.
            to_blame: Whether the endpoint has failed, and not the call, so that another endpoint may be tried at once.
        """
        if tried and was_sent(error):
            self._count_attempt()
        if to_blame and self._has_attempts_left():
            return 0.0  # another endpoint may be tried in the same round
        if tried or self.error is not None:
            if not self.counted:
                self._count_attempt()  # no try was sent, so all tries of the round are one attempt
            may_go_on = self._has_attempts_left()
        else:
            may_go_on = self.wait_for_ready  # the round had no endpoint to try
        if not may_go_on or not is_retryable(error):
            return None
        delay = self._delay_between_rounds(error, jitter)
        # An infinite backoff may make the delay NaN. The call gives up then too.
        if not now + delay < self.deadline:
            return None
        self.counted = False
        self.failed.clear()
        self.error = None
        self.may_reread = True
        return delay

    def _delay_between_rounds(self, error: FlywheelError, jitter: float) -> float:
        """Returns the seconds to wait; infinity if the server asks for more than `max_delay`."""
        retry = self.retry or DEFAULT_RETRY
        self.backoff = min(self.backoff * retry.multiplier if self.backoff else retry.initial_backoff, retry.max_backoff)
        if error.retry_delay is None:
            return self.backoff * (1 - BACKOFF_JITTER + 2 * BACKOFF_JITTER * jitter)
        if error.retry_delay <= retry.max_delay:
            return max(error.retry_delay, 0.0) + self.backoff * jitter
        return inf

    def _count_attempt(self) -> None:
        self.attempts += 1
        self.counted = True

    def _has_attempts_left(self) -> bool:
        return self.retry is not None and self.attempts < self.retry.max_attempts


def was_sent(error: FlywheelError) -> bool:
    """Returns whether a server may have received the call that failed with this error.

    Only grpc's message tells that grpc had no connection for the call. A call with any other message counts as sent, also
    with a message of a later version of grpc: then the call makes too few tries rather than too many.
    """
    return not error.message.startswith(NO_CONNECTION_MESSAGES)


def is_retryable(error: FlywheelError) -> bool:
    """Returns whether a call that failed with this error, before the engine began on it, may succeed later."""
    if isinstance(error, UnavailableError):
        return True
    match error.code:
        case grpc.StatusCode.UNAVAILABLE:
            return True
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return error.retry_delay is not None
        case grpc.StatusCode.CANCELLED:
            # No reason of the server: grpc itself cancels a call that arrives while the server stops.
            return not error.reason
        case _:
            return False
