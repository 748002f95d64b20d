"""What parent and workers send one another: arrays of JSON, one a line, over a pair of sockets that nobody else can open.

From a worker:

    enter     call, caller, samples, tokens, time_remaining     takes a share of the quotas and a place in the queue; with
              [, context_tokens]                                context_tokens, which are known, waits for room as well
    admit     call, context_tokens, time_remaining              waits for room
    leave     call, finished, used_tokens                       gives up the place or the room, and the share of the quotas
                                                                unless used_tokens is null
    settle    call, used_tokens                                 gives back the share of the quotas
    capacity  slots, context_tokens                             what the engine works on at a time
    health    serving, runners                                  how the worker and its engine are
    hello                                                       the worker can be told to stop
    ready                                                       the worker has begun to serve
    failed    why                                               the worker cannot start
    total     question                                          asks for the counts of all workers
    counts    question, counts                                  answers `count`

From the parent:

    admitted  call
    refused   call, error                                       ends the call, which then holds nothing any more
    health    serving, runners                                  how all workers are, together
    count     question                                          asks for the counts of this worker
    total     question, counts                                  answers `total`
    stop                                                        drain; a second one ends the drain

A call costs one exchange, before its engine begins, and one line at its end.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, cast

from pydantic_core import from_json, to_json

from flywheel_server.access.callers import Caller
from flywheel_server.errors import DeadlineExceededError, QuotaExceededError, ServerFullError

Line = Sequence[Any]

REFUSALS: Final = (DeadlineExceededError, QuotaExceededError, ServerFullError)
"""The errors of quotas and admission."""

_BY_NAME: Final[dict[str, Callable[..., Exception]]] = {error.__name__: error for error in REFUSALS}


class Connection(asyncio.Protocol):
    """One end of the pair.

    Arguments:
        handlers: What to call for the lines that arrive, by their first word, with the rest.
        on_end: Is called when the other process has ended, or has closed its end.
    """

    def __init__(self, handlers: Mapping[str, Callable[..., None]], on_end: Callable[[], None]) -> None:
        self._handlers = handlers
        self._on_end = on_end
        self._incomplete_line = b""
        self._transport: asyncio.WriteTransport | None = None
        self._ended = asyncio.Event()

    def send(self, *line: Any) -> None:  # noqa: ANN401 - whatever JSON can hold
        """Sends a line, without waiting; does nothing once the connection has ended."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(to_json(line) + b"\n")

    async def close(self) -> None:
        """Closes this end, and returns when all lines have been sent, or the other end is closed."""
        if self._transport is not None:
            self._transport.close()
            await self._ended.wait()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begins."""
        self._transport = cast("asyncio.WriteTransport", transport)

    def data_received(self, data: bytes) -> None:
        """Passes on the lines that are whole."""
        *lines, self._incomplete_line = (self._incomplete_line + data).split(b"\n")
        for line in lines:
            kind, *arguments = from_json(line)
            self._handlers[kind](*arguments)

    def connection_lost(self, _: Exception | None) -> None:
        """Ends."""
        self._transport = None
        self._ended.set()
        self._on_end()


def from_caller(caller: Caller) -> Line:
    """Returns a caller as JSON can hold it."""
    return (caller.name, caller.priority, caller.max_concurrent, caller.tokens_per_minute)


def to_caller(line: Line) -> Caller:
    """Returns the caller that `from_caller` made this of."""
    return Caller(*line)


def from_error(error: Exception) -> Line:
    """Returns a refusal as JSON can hold it."""
    return (type(error).__name__, *error.args)


def to_error(line: Line) -> Exception:
    """Returns the refusal that `from_error` made this of."""
    name, *arguments = line
    return _BY_NAME[name](*arguments)
