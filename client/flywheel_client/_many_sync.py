"""The results of `generate_many`, for threads."""

import threading
from collections.abc import Callable, Iterable
from queue import SimpleQueue
from types import TracebackType
from typing import Protocol, Self, Unpack

from flywheel_proto.v1 import generation_pb2

from flywheel_client._errors import FlywheelError
from flywheel_client._many import BasePromptResults
from flywheel_client._request import GenerationFields, Prompt
from flywheel_client._results import PromptResult, Response, response_from


class _Call(Protocol):
    """A running call."""

    def answer(self) -> generation_pb2.GenerationResponse: ...
    def cancel(self) -> object: ...


Outcome = Response | BaseException


class PromptResults(BasePromptResults):
    """Yields the results of `generate_many` as they come, with the positions of their prompts.

    Each running call has a thread, which waits for the answer. Prompts are read, and calls begin, only in the thread that
    iterates, while it waits for the next result. All running calls are cancelled on the server, and their threads end, when a
    `with` block ends, by `close()`, by an exception that interrupts the wait for the next result, and when the last reference
    to this object is gone. Signal handlers and finalizers may call `close()` at any time.
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
        self._running: dict[int, _Call] = {}
        self._outcomes: SimpleQueue[tuple[int, Outcome]] = SimpleQueue()
        self._ended = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> PromptResult:
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
        if self._ended:
            return
        self._ended = True
        for call in list(self._running.values()):
            call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def _begin_next(self) -> None:
        """Reads a prompt, if there is one, and begins its call."""
        try:
            prompt = next(self._prompts)
        except StopIteration:
            self._all_read = True
            return
        position = self._prompts_read
        call = self._begin(self._request_for(prompt))
        self._running[position] = call
        if self._ended:
            call.cancel()  # `close` has not seen the call
        # The thread does not hold this object, so that the calls end when the object is gone. It is a daemon thread, because a
        # program may end while this object still exists.
        threading.Thread(
            target=_wait, args=(call, position, self._outcomes), name=f"flywheel-prompt-{position}", daemon=True
        ).start()


def _wait(call: _Call, position: int, outcomes: "SimpleQueue[tuple[int, Outcome]]") -> None:
    outcomes.put((position, _outcome(call)))


def _outcome(call: _Call) -> Outcome:
    try:
        return response_from(call.answer())
    except BaseException as error:  # noqa: BLE001 - raised in the thread that iterates
        return error
