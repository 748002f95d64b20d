"""The end of a call that nobody waits for any longer."""

import asyncio
from types import TracebackType
from typing import Self


class Deadline:
    """Ends what runs within its context at a time, or earlier, by cancelling its task; then raises `TimeoutError`.

    It does what `asyncio.timeout` does, for half of what that costs: every call has one.

    Arguments:
        when: The time on the clock of the event loop; None if there is no such time.

    Attributes:
        has_expired: Whether the deadline has passed or was brought forward before the context ended.
    """

    def __init__(self, when: float | None) -> None:
        self.when = when
        self.has_expired = False
        self._is_over = False
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.Handle | None = None

    def __enter__(self) -> Self:
        task = asyncio.current_task(self._loop)
        if task is None:
            raise RuntimeError("a deadline belongs to a task")
        self._task = task
        self._cancelling = task.cancelling()
        if self.when is not None:
            self._timer = self._loop.call_at(self.when, self._expire)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._is_over = True
        if self._timer is not None:
            self._timer.cancel()
        # If others have cancelled the task as well, it is their cancellation that goes on.
        if self.has_expired and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise TimeoutError from error

    def expire(self) -> None:
        """Ends what runs within the context soon, unless it is ending already or has ended."""
        if not self.has_expired and not self._is_over:
            if self._timer is not None:
                self._timer.cancel()
            # Later: whoever calls may be what is to be ended.
            self._timer = self._loop.call_soon(self._expire)

    def _expire(self) -> None:
        self.has_expired = True
        self._task.cancel()
