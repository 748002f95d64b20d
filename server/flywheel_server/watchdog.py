"""Bounds how long many short waits may take, with one timer for all of them: a timer for each would cost more than the wait."""

from collections.abc import Callable
from typing import Generic, TypeVar

from flywheel_server import running_time

K = TypeVar("K")


class Watchdog(Generic[K]):
    """Reports each wait that takes longer than `timeout`, up to `running_time.TICK` late.

    A wait is named by a key, such as the future that is awaited.

    Arguments:
        timeout: Seconds of running time.
        on_timeout: Called with the key of a wait that takes too long, perhaps repeatedly until `stop`. Must not start or stop a
            wait itself.
    """

    def __init__(self, timeout: float, on_timeout: Callable[[K], None]) -> None:
        self._timeout = timeout
        self._on_timeout = on_timeout
        self._clock = running_time.clock()
        self._started: dict[K, float] = {}
        """When each wait started, in running time, the oldest first."""
        self._has_timer = False

    def start(self, key: K) -> None:
        """Starts a wait; none with this key may be running."""
        self._started[key] = self._clock.time()
        if not self._has_timer:
            self._set_timer(self._timeout)

    def stop(self, key: K) -> None:
        """Ends a wait, if there is one with this key."""
        self._started.pop(key, None)

    def waits(self) -> list[K]:
        """Returns the keys of all waits, the oldest first."""
        return list(self._started)

    def _set_timer(self, seconds: float) -> None:
        self._has_timer = True
        self._clock.call_later(seconds, self._check)

    def _check(self) -> None:
        self._has_timer = False
        for key, started in self._started.items():
            remaining = started + self._timeout - self._clock.time()
            if remaining > 0:
                self._set_timer(max(remaining, running_time.TICK))
                return
            self._on_timeout(key)
