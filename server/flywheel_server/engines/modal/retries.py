"""How often a request to Modal is made again, and how long an error is doubted before it is believed.

Modal limits requests, deploys its own servers, and may answer from one that lags behind. So one reading is no verdict.
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
"""What a request raises that Modal has certainly not accepted, and may accept at the next try."""

MAX_TRIES: Final = 3
"""How often a request is made that Modal refuses."""

FIRST_DELAY: Final = 0.25
"""Seconds until the first further try, after those that Modal asks for. All delays vary by a quarter, to spread the tries."""

MAX_DELAY: Final = 5.0
"""Seconds that the delays, which double, grow to."""

MAX_RETRY_AFTER: Final = 30.0
"""Seconds that Modal may ask for at most, before it is asked again all the same."""

CONFIRMATION_SECONDS: Final = 10.0
"""How long an error must last that would not pass if it were true, such as that there is no such call."""


class Backoff:
    """The delays between tries that go on failing, of `max_delay` seconds at most unless Modal asks for more."""

    def __init__(self, max_delay: float | None = None) -> None:
        self._max_delay = MAX_DELAY if max_delay is None else max_delay
        self.failures = 0

    def reset(self) -> None:
        """Begins anew, after a try that succeeded."""
        self.failures = 0

    def delay(self, error: BaseException) -> float:
        """Returns the seconds until the next try, after one that failed with the error."""
        asked = min(error.retry_delay, MAX_RETRY_AFTER) if isinstance(error, EngineOverloadedError) else 0.0
        delay = min(FIRST_DELAY * 2.0 ** min(self.failures, 10), self._max_delay)
        self.failures += 1
        return asked + delay * random.uniform(0.75, 1.25)  # noqa: S311 - nothing is secret in it


async def retry_refused(request: Callable[[], Awaitable[T]]) -> T:
    """Returns what the request returns, which is made `MAX_TRIES` times at most, until it raises none of `REFUSALS`."""
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
    """Decides between two readings whether an error is believed, which ends the reading.

    Arguments:
        patience: Seconds that errors which pass by themselves may last. Any other is believed after `CONFIRMATION_SECONDS`.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._failing_since: float | None = None
        self._doubted_since: float | None = None
        self._backoff = Backoff()

    @property
    def failures(self) -> int:
        """How many readings in a row have failed."""
        return self._backoff.failures

    def dispel(self) -> None:
        """Forgets all errors, because a reading has succeeded."""
        self._failing_since = self._doubted_since = None
        self._backoff = Backoff()

    def delay(self, error: EngineError, *, passes: bool) -> float:
        """Returns the seconds until the next reading, after one that failed; raises the error if it is believed."""
        now = running_time.now()
        if self._failing_since is None:
            self._failing_since = now
        if passes:
            self._doubted_since = None
        elif self._doubted_since is None:
            self._doubted_since = now
        has_lasted = self._doubted_since is not None and now - self._doubted_since >= CONFIRMATION_SECONDS
        if has_lasted or now - self._failing_since >= self._patience:
            raise error
        return self._backoff.delay(error)
