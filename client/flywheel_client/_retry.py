"""Whether and when a call is tried again: the decisions that both clients share.

Nothing here waits, looks at a clock, or throws dice: `now` is the caller's, in seconds of `time.monotonic()`, and so is
`jitter`, a number of 0 to 1.
"""

from dataclasses import dataclass, field
from math import inf
from numbers import Integral, Real
from typing import Final

import grpc

from flywheel_client._errors import FlywheelError, UnavailableError
from flywheel_client._timeouts import seconds_of

BACKOFF_JITTER: Final = 0.2
"""By how much of itself a backoff is shorter or longer, so that clients that failed together do not return together."""

NO_CONNECTION_MESSAGES: Final = ("failed to connect to all addresses", "DNS resolution failed", "errors resolving")
"""How the message of grpc begins if it could not connect to an address."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """How a call is tried again that failed before the engine began on it.

    The server sends the headers of its answer (initial metadata) when the engine begins. A call is never tried again once
    they have arrived, even if no result has. This is the rule of gRPC's own retries (gRFC A6). Before that, a call is tried
    again if the server was UNAVAILABLE, was full and said when to come back (RESOURCE_EXHAUSTED with `RetryInfo`), or
    stopped as the call arrived (CANCELLED), and if something on the way ended the call (INTERNAL or UNKNOWN without a
    reason of the server). The wait is what the server asks for and a little more, or else a backoff that
    grows from one attempt to the next. One deadline holds for all attempts: if it would pass first, the call fails at once.

    Attributes:
        max_attempts: How often a call is sent at most, the first time included, to all endpoints of a directory together.
            If a connection breaks before the headers have arrived, nobody can tell whether the engine had begun: so this
            is also how often the engine can begin on a call, or how many servers a call can crash. Addresses of a
            directory that cannot be connected to are passed over; only if there is no other do they count as one attempt.
        initial_backoff: The seconds before the second attempt, give or take a fifth.
        max_backoff: The longest backoff in seconds; may be infinite.
        multiplier: By how much a backoff is longer than the one before.
        max_delay: The longest wait in seconds that a server may ask for. Where it asks for more, the call fails at once, and
            the error's `retry_delay` says when to come back. Infinity waits as long as any server asks for.
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
    """What one call has tried so far, and until when it may go on.

    If a service has several endpoints, a call goes from one to the next without a wait. The tries between two waits are a
    round; `counted`, `failed`, `error` and `may_reread` are about the round that is under way.
    """

    retry: Retry | None
    deadline: float
    wait_for_ready: bool
    """Whether to wait if there is no endpoint to try."""
    attempts: int = 0
    """How many have failed: each try that was sent, and each round of which none was."""
    counted: bool = False
    """Whether the round is among the attempts."""
    backoff: float = 0.0
    failed: set[str] = field(default_factory=set)
    """The addresses that are not tried again in this round."""
    error: Exception | None = None
    may_reread: bool = True

    @classmethod
    def begin(cls, retry: Retry | None, timeout: float | None, now: float, *, wait_for_ready: bool = False) -> "Tries":
        """Returns those of a call that begins now."""
        return cls(retry, inf if timeout is None else now + timeout, wait_for_ready)

    def remaining(self, now: float) -> float | None:
        """Returns the seconds until the deadline; None if there is none."""
        return None if self.deadline == inf else max(self.deadline - now, 0.0)

    def delay(
        self, error: FlywheelError, now: float, jitter: float, *, tried: bool = True, to_blame: bool = False
    ) -> float | None:
        """Returns the seconds until the next try; None if there is to be none, so that the error stands.

        Args:
            error: Why the last try failed, before the engine began.
            now: The time.
            jitter: A random number of 0 to 1.
            tried: Whether there was an endpoint to try. Waiting for one is not an attempt, and only done if the caller wants
                to wait.
            to_blame: Whether the endpoint failed rather than the call, which may then go to another one at once.
        """
        if tried and was_sent(error):
            self._count()
        if to_blame and self._may_go_on():
            return 0.0
        tried = tried or self.error is not None
        if tried and not self.counted:
            self._count()
        if not (self._may_go_on() if tried else self.wait_for_ready) or not is_retryable(error):
            return None
        retry = self.retry or DEFAULT_RETRY
        backoff = min(self.backoff * retry.multiplier or retry.initial_backoff, retry.max_backoff)
        if error.retry_delay is None:
            delay = backoff * (1 - BACKOFF_JITTER + 2 * BACKOFF_JITTER * jitter)
        elif error.retry_delay <= retry.max_delay:
            delay = max(error.retry_delay, 0.0) + backoff * jitter
        else:
            return None
        # Infinite backoffs may make it NaN, which is no wait either.
        if not now + delay < self.deadline:
            return None
        self.backoff = backoff
        self.counted = False
        self.failed.clear()
        self.error = None
        self.may_reread = True
        return delay

    def _count(self) -> None:
        self.attempts += 1
        self.counted = True

    def _may_go_on(self) -> bool:
        return self.retry is not None and self.attempts < self.retry.max_attempts


def was_sent(error: FlywheelError) -> bool:
    """Returns whether a server may have received a call that ended so.

    Only its words tell that grpc had no connection to send the call on. Other words, also those of later versions, count as
    sent, which errs on the side of fewer tries.
    """
    return not error.message.startswith(NO_CONNECTION_MESSAGES)


def is_retryable(error: FlywheelError) -> bool:
    """Returns whether a call that ended so, before the engine began on it, may end better the next time."""
    if isinstance(error, UnavailableError):
        return True
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
