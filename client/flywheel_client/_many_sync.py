"""The results of `generate_many`, for threads."""

import threading
from collections.abc import Callable, Iterable
from contextvars import Context, copy_context
from functools import partial
from queue import SimpleQueue
from types import TracebackType
from typing import Protocol, Self, Unpack

from flywheel_proto.v1 import generation_pb2

from flywheel_client._calls_sync import require_not_in_call
from flywheel_client._errors import FlywheelError
from flywheel_client._janitor import Janitor
from flywheel_client._many import BasePromptResults
from flywheel_client._request import GenerationFields, Prompt
from flywheel_client._results import PromptResult, Response, response_from


class _Call(Protocol):
    """A running call."""

    def answer(self) -> generation_pb2.GenerationResponse: ...
    def cancel(self) -> object: ...


Outcome = Response | BaseException
Outcomes = SimpleQueue[tuple[int, Outcome]]


class _PromptCall:
    """The call for one prompt. It begins and ends in a thread of its own, so that no signal interrupts grpc in it."""

    def __init__(self, begin: Callable[[], _Call]) -> None:
        self._begin = begin
        self._call: _Call | None = None
        self._cancelled = False

    def outcome(self) -> Outcome:
        """Makes the call."""
        try:
            self._call = call = self._begin()
            if self._cancelled:
                call.cancel()  # `cancel` may not have seen the call
            return response_from(call.answer())
        except BaseException as error:  # noqa: BLE001 - raised in the thread that iterates
            return error

    def cancel(self) -> None:
        """Cancels the call as soon as it has begun. Any thread may call this at any time."""
        self._cancelled = True
        if self._call is not None:
            self._call.cancel()


class PromptResults(BasePromptResults):
    """Yields the results of `generate_many` as they come, with the positions of their prompts.

    Each call has a thread. Prompts are read only in the thread that iterates, while it waits for the next result. All running
    calls are cancelled on the server, and their threads end, when a `with` block ends, by `close()`, by an exception that
    interrupts the wait for the next result, and when the last reference to this object is gone. The exception may be a
    `KeyboardInterrupt`: the client remains usable. Signal handlers and finalizers may call `close()` at any time.
    """

    def __init__(
        self,
        begin: Callable[[generation_pb2.GenerationRequest], _Call],
        prompts: Iterable[Prompt],
        concurrency: int,
        **fields: Unpack[GenerationFields],
    ) -> None:
        super().__init__(prompts, concurrency, **fields)
        self._begin = begin
        self._prompts = iter(prompts)
        self._running: dict[int, _PromptCall] = {}
        # An interrupted `Thread.start` may raise a `RuntimeError` of Python's own locks, so the starter's thread calls it.
        self._starter = Janitor()
        self._outcomes: Outcomes = SimpleQueue()
        self._ended = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> PromptResult:
        require_not_in_call()
        try:
            while not self._ended and not self._all_read and len(self._running) < self._concurrency:
                self._begin_next()
            if self._ended or not self._running:
                raise StopIteration
            position, outcome = self._outcomes.get()
            if self._ended:
                raise StopIteration
            # Until here, a result that nobody has fetched counts as running, so that prompts are never read far ahead.
            del self._running[position]
            if not isinstance(outcome, Response | FlywheelError):
                raise outcome
            return PromptResult(position, outcome)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Cancels all running calls, and ends the iteration."""
        self._ended = True
        self._starter.end()
        # An interrupt may have ended an earlier `close`, so this cancels all calls again.
        for call in list(self._running.values()):
            call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._ended:
            self.close()

    def _begin_next(self) -> None:
        """Reads a prompt, if there is one, and begins its call."""
        try:
            prompt = next(self._prompts)
        except StopIteration:
            self._all_read = True
            return
        position = self._prompts_read
        call = _PromptCall(partial(self._begin, self._request_for(prompt)))
        self._running[position] = call
        # Neither thread holds this object, so that the calls end when the object is gone. The context has the caller's span.
        self._starter.run_soon(partial(_start, copy_context(), call, position, self._outcomes))


def _start(context: Context, call: _PromptCall, position: int, outcomes: Outcomes) -> None:
    """Starts the thread of a call. It is a daemon thread, because a program may end while the call runs."""
    arguments = (_put_outcome, call, position, outcomes)
    try:
        threading.Thread(target=context.run, args=arguments, name=f"flywheel-prompt-{position}", daemon=True).start()
    except BaseException as error:  # noqa: BLE001 - raised in the thread that iterates
        outcomes.put((position, error))


def _put_outcome(call: _PromptCall, position: int, outcomes: Outcomes) -> None:
    outcomes.put((position, call.outcome()))
