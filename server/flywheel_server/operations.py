"""Runs gRPC operations, such as receiving or sending a message, to their end, even if nobody waits for their results.

Receiving a message, and sending the initial metadata, must not be cancelled. If they are, gRPC never frees the memory of the
message that arrives, and forgets that the initial metadata were sent. Sending a message may be cancelled.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

from flywheel_server.watchdog import Watchdog

T = TypeVar("T")


class Operation(Generic[T]):
    """A gRPC operation that continues even if the wait for its result ends.

    It starts at once and needs no task: each future that the coroutine awaits resumes the coroutine when it is done.

    Attributes:
        result: The result of the operation. Cancelling this future, or setting an exception, ends the wait but not the
            operation.
        is_over: Whether the operation has ended.
    """

    __slots__ = ("_coroutine", "_end", "is_over", "result")

    def __init__(self, coroutine: Coroutine[Any, Any, T]) -> None:
        self.result: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._coroutine = coroutine
        self.is_over = False
        self._end: asyncio.Future[None] | None = None
        self._resume()

    def end(self) -> asyncio.Future[None]:
        """Returns a future that is done when the operation has ended, even if `result` was cancelled."""
        if self._end is None:
            self._end = asyncio.get_running_loop().create_future()
            if self.is_over:
                self._end.set_result(None)
        return self._end

    def _resume(self, _: object = None) -> None:
        try:
            step = self._coroutine.send(None)
        except StopIteration as end:
            if not self.result.done():
                self.result.set_result(end.value)
            self._finish()
        except Exception as error:  # noqa: BLE001 - raised where the result is awaited
            if not self.result.done():
                self.result.set_exception(error)
                # asyncio logs an exception that is never retrieved.
                self.result.exception()
            self._finish()
        else:
            step.add_done_callback(self._resume)

    def _finish(self) -> None:
        self.is_over = True
        if self._end is not None and not self._end.done():
            self._end.set_result(None)


class OperationWaiter:
    """Waits for operations, for each at most `timeout` seconds of running time; see `Watchdog`.

    Arguments:
        timeout: Seconds that an operation may take.
        timeout_error: Makes the error of an operation that takes longer.
    """

    def __init__(self, timeout: float, timeout_error: Callable[[], Exception]) -> None:
        self._watchdog = Watchdog[asyncio.Future[Any]](timeout, lambda result: _fail(result, timeout_error))
        self._end_error: Callable[[], Exception] | None = None

    async def wait(self, operation: Operation[T]) -> T:
        """Returns the result of the operation. Raises `timeout_error` if there is none in time."""
        result = operation.result
        if result.done():
            return result.result()
        if self._end_error is not None:
            raise self._end_error()
        self._watchdog.start(result)
        try:
            return await result
        finally:
            self._watchdog.stop(result)

    def end(self, error: Callable[[], Exception]) -> None:
        """Ends every wait, present and future, with an error."""
        self._end_error = error
        for result in self._watchdog.waits():
            _fail(result, error)


def _fail(result: asyncio.Future[Any], error: Callable[[], Exception]) -> None:
    if not result.done():
        result.set_exception(error())
