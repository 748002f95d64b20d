"""The messages between parent and workers: JSON arrays, one per line, over a socket pair that no other process can open.

From a worker:

    enter     call, caller, samples, tokens, time_remaining     reserve quota and a place in the queue; if
              [, context_tokens]                                context_tokens are known, wait for slots too; the caller
                                                                is an object with the attributes of `Caller`
    admit     call, context_tokens, time_remaining              wait for slots
    confirm   call                                              wait for the quota and the place only
    leave     call, finished, used_tokens                       release the place or the slots, and settle the reservation
                                                                unless used_tokens is null
    settle    call, used_tokens                                 settle the reservation: give back all but used_tokens
    capacity  slots, context_tokens                             the engine's capacity
    health    serving, runners                                  the health of the worker and its engine
    hello                                                       the worker can be told to stop
    ready                                                       the worker has begun to serve
    failed    why                                               the worker cannot start
    total     question                                          asks for the counts of all workers
    counts    question, counts                                  answers `count`
    report    question, metrics                                 answers `metrics`

From the parent:

    admitted  call                                              the call has slots, or what `confirm` waits for
    refused   call, error                                       ends the call, which has lost its place or its slots
    health    serving, runners                                  the health of all workers together
    count     question                                          asks for the counts of this worker
    metrics   question                                          asks for the metrics of this worker
    total     question, counts                                  answers `total`
    debug     is_on                                             log debug, or stop that
    stop                                                        drain; a second stop ends the drain

A call costs one exchange before its generation starts, and one line at its end.
"""

import asyncio
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, cast

from pydantic_core import from_json, to_json

from flywheel_server.errors import DeadlineExceededError, QuotaExceededError, ServerFullError

Line = Sequence[Any]

REFUSALS: Final = (DeadlineExceededError, QuotaExceededError, ServerFullError)
"""The errors of quotas and admission."""

_BY_NAME: Final[dict[str, Callable[..., Exception]]] = {error.__name__: error for error in REFUSALS}


class Connection(asyncio.Protocol):
    """One end of the socket pair.

    Arguments:
        handlers: The functions to call for messages, by the first element of the line, with the other elements.
        on_end: Called when the other process has ended, or has closed its end.
    """

    def __init__(self, handlers: Mapping[str, Callable[..., None]], on_end: Callable[[], None]) -> None:
        self._handlers = handlers
        self._on_end = on_end
        self._incomplete_line = b""
        self._transport: asyncio.WriteTransport | None = None
        self._ended = asyncio.Event()

    def send(self, *line: Any) -> None:  # noqa: ANN401 - any JSON
        """Sends a line, without waiting. Does nothing if the connection has ended."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(to_json(line) + b"\n")

    async def close(self) -> None:
        """Closes this end, and returns after all lines have been sent, or the other end is closed."""
        if self._transport is not None:
            self._transport.close()
            await self._ended.wait()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Stores the transport."""
        self._transport = cast("asyncio.WriteTransport", transport)

    def data_received(self, data: bytes) -> None:
        """Calls the handlers of complete lines."""
        *lines, self._incomplete_line = (self._incomplete_line + data).split(b"\n")
        for line in lines:
            kind, *arguments = from_json(line)
            self._handlers[kind](*arguments)

    def connection_lost(self, _: Exception | None) -> None:
        """Reports the end of the connection."""
        self._transport = None
        self._ended.set()
        self._on_end()


class Questions:
    """Asks the other process for figures, and receives the answers.

    Arguments:
        connection: The connection to the other process.
        kind: The first element of the line with a question.
    """

    def __init__(self, connection: Connection, kind: str) -> None:
        self._connection = connection
        self._kind = kind
        self._numbers = itertools.count()
        self._pending: dict[int, asyncio.Future[Line]] = {}

    def ask(self) -> asyncio.Future[Line]:
        """Sends a question, and returns the future of the answer. If the future is cancelled, the answer is ignored."""
        number = next(self._numbers)
        answer = self._pending[number] = asyncio.get_running_loop().create_future()
        answer.add_done_callback(lambda _: self._pending.pop(number))
        self._connection.send(self._kind, number)
        return answer

    def receive(self, number: int, figures: Line) -> None:
        """Handles a message with an answer."""
        if (answer := self._pending.get(number)) and not answer.done():
            answer.set_result(figures)

    def unanswered(self) -> list[asyncio.Future[Line]]:
        """Returns the futures of the questions that have no answer yet."""
        return [answer for answer in self._pending.values() if not answer.done()]


def from_error(error: Exception) -> Line:
    """Returns a refusal as a JSON array."""
    return (type(error).__name__, *error.args)


def to_error(line: Line) -> Exception:
    """Returns the refusal of a `from_error` array."""
    name, *arguments = line
    return _BY_NAME[name](*arguments)
