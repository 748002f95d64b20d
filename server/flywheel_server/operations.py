"""Operations of gRPC, such as to receive a message or to send one, and bounds on how long they are waited for.

gRPC must see each of its operations to the end. Of one that is cancelled while it waits, gRPC keeps the memory of the message
for ever, and forgets that initial metadata have been sent.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

from flywheel_server import running_time

T = TypeVar("T")


class Operation(Generic[T]):
    """An operation of gRPC that goes on when nobody waits for it any more.

    It begins at once, and needs no task: each step of the coroutine follows from the one before it.

    Attributes:
        result: What comes of the operation. To cancel this future, or to set an exception, ends the wait but not the operation.
    """

    __slots__ = ("_coroutine", "_end", "_is_over", "result")

    def __init__(self, coroutine: Coroutine[Any, Any, T]) -> None:
        self.result: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._coroutine = coroutine
        self._is_over = False
        self._end: asyncio.Future[None] | None = None
        self._go_on()

    @property
    def is_over(self) -> bool:
        """Whether the operation has ended."""
        return self._is_over

    def end(self) -> asyncio.Future[None]:
        """Returns a future that is done when the operation has ended, whoever has waited for its result."""
        if self._end is None:
            self._end = asyncio.get_running_loop().create_future()
            if self._is_over:
                self._end.set_result(None)
        return self._end

    def _go_on(self, _: object = None) -> None:
        try:
            step = self._coroutine.send(None)
        except StopIteration as end:
            if not self.result.done():
                self.result.set_result(end.value)
            self._finish()
        except Exception as error:  # noqa: BLE001 - for whoever waits
            if not self.result.done():
                self.result.set_exception(error)
                # Asyncio complains of an error that nobody looks at.
                self.result.exception()
            self._finish()
        else:
            step.add_done_callback(self._go_on)

    def _finish(self) -> None:
        self._is_over = True
        if self._end is not None and not self._end.done():
            self._end.set_result(None)


class Waits:
    """Waits for operations, each for at most `seconds` of running time, give or take `running_time.TICK`.

    One timer looks after all waits that are open, because a timer for each would cost more than the rest of the wait.

    Arguments:
        seconds: How long an operation may take.
        error: Returns what is raised if an operation takes longer.
    """

    def __init__(self, seconds: float, error: Callable[[], Exception]) -> None:
        self._seconds = seconds
        self._error = error
        self._ended_by: Callable[[], Exception] | None = None
        self._since: dict[asyncio.Future[Any], float] = {}
        """When each wait began, the oldest first."""
        self._is_looking = False
        self._clock: running_time.Clock | None = None

    async def wait(self, operation: Operation[T]) -> T:
        """Returns what comes of the operation. Raises the error of these waits if nothing comes in time."""
        result = operation.result
        if result.done():
            return result.result()
        if self._ended_by is not None:
            raise self._ended_by()
        if self._clock is None:
            self._clock = running_time.clock()
        if not self._is_looking:
            self._look_later(self._clock, self._seconds)
        self._since[result] = self._clock.time()
        try:
            return await result
        finally:
            del self._since[result]

    def end(self, error: Callable[[], Exception]) -> None:
        """Ends all waits with an error, those to come too."""
        self._ended_by = error
        for result in self._since:
            if not result.done():
                result.set_exception(error())

    def _look_later(self, clock: running_time.Clock, seconds: float) -> None:
        self._is_looking = True
        clock.call_later(seconds, lambda: self._look(clock))

    def _look(self, clock: running_time.Clock) -> None:
        self._is_looking = False
        for result, since in self._since.items():
            remaining = since + self._seconds - clock.time()
            if remaining > 0:
                self._look_later(clock, max(remaining, running_time.TICK))
                return
            if not result.done():
                result.set_exception(self._error())
