"""When a request to Modal is made again, and when an error of Modal's ends the retries.

Modal limits requests, redeploys its own servers, and may answer from a server that lags behind. So a single error decides
nothing.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from modal import exception

from flywheel_server import running_time
from flywheel_server.engines.base import EngineError, EngineOverloadedError

T = TypeVar("T")

REFUSALS: Final = (
    exception.NotFoundError,
    exception.PermissionDeniedError,
    exception.AuthError,
    exception.InvalidError,
    exception.ConflictError,
    exception.UnimplementedError,
)
"""Errors of a request that Modal has certainly not carried out. The next try may succeed."""

MAX_TRIES: Final = 3
"""How often a request is made if Modal refuses it."""

FIRST_DELAY: Final = 0.25
"""Seconds of backoff before the first retry. Each delay varies by a quarter at random, to spread the retries of many calls."""

MAX_DELAY: Final = 5.0
"""Maximum seconds of backoff. The backoff doubles with each retry."""

MAX_RETRY_AFTER: Final = 30.0
"""Maximum seconds that a retry waits because Modal asks for it."""

CONFIRMATION_SECONDS: Final = 10.0
"""How long an error that looks permanent, such as that there is no such call or queue, must last before it is believed."""


class Backoff:
    """Exponential backoff between tries that fail.

    Arguments:
        max_delay: Maximum seconds of backoff; `MAX_DELAY` if not given. A delay that Modal asks for is added.
    """

    def __init__(self, max_delay: float | None = None) -> None:
        self._max_delay = MAX_DELAY if max_delay is None else max_delay
        self.failures = 0

    def reset(self) -> None:
        """Starts again with the first delay, after a try that succeeded."""
        self.failures = 0

    def delay(self, error: BaseException) -> float:
        """Returns the seconds to wait after a try that failed with the error."""
        retry_after = min(error.retry_delay, MAX_RETRY_AFTER) if isinstance(error, EngineOverloadedError) else 0.0
        backoff = min(FIRST_DELAY * 2.0 ** min(self.failures, 10), self._max_delay)
        self.failures += 1
        return retry_after + backoff * random.uniform(0.75, 1.25)  # noqa: S311 - no secret depends on it


async def retry_refused(request: Callable[[], Awaitable[T]]) -> T:
    """Makes the request, and returns its result. If Modal refuses it (`REFUSALS`), makes it up to `MAX_TRIES` times."""
    backoff = Backoff()
    while True:
        try:
            return await request()
        except REFUSALS as error:
            delay = backoff.delay(error)
            if backoff.failures == MAX_TRIES:
                raise
        await asyncio.sleep(delay)


class RetryPolicy:
    """Decides after each failed request about a call whether to make the request again.

    Arguments:
        timeout: Seconds for which requests may go on failing. An error that is not transient is believed after
            `CONFIRMATION_SECONDS`.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._failing_since: float | None = None
        self._permanent_since: float | None = None
        self._backoff = Backoff()

    @property
    def failures(self) -> int:
        """How many requests in a row have failed."""
        return self._backoff.failures

    def reset(self) -> None:
        """Forgets all failures, because a request has succeeded."""
        self._failing_since = self._permanent_since = None
        self._backoff.reset()

    def delay(self, error: EngineError, *, is_transient: bool) -> float:
        """Returns the seconds until the next try; raises the error if there shall be no further try."""
        now = running_time.now()
        if self._failing_since is None:
            self._failing_since = now
        if is_transient:
            self._permanent_since = None
        elif self._permanent_since is None:
            self._permanent_since = now
        is_confirmed = self._permanent_since is not None and now - self._permanent_since >= CONFIRMATION_SECONDS
        if is_confirmed or now - self._failing_since >= self._timeout:
            raise error
        return self._backoff.delay(error)
