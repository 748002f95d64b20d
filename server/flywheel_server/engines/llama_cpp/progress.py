"""The progress of one request whose samples are made by several completions."""

import asyncio

from flywheel_server.engines.base import EngineError, Event, Sink, Started
from flywheel_server.messages import GenerationResponseSample


class Progress:
    """Passes the events of several completions on to one sink.

    Attributes:
        finished: Has a result when all samples have finished, or the first error.
    """

    def __init__(self, sink: Sink, num_samples: int) -> None:
        self.finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sink = sink
        self._unfinished = num_samples
        self._started = False

    def start(self, prompt_tokens: int) -> None:
        """Emits `Started` if this is the first completion that starts."""
        if not self._started:
            self._started = True
            self.emit(Started(prompt_tokens))

    def emit(self, event: Event) -> None:
        """Emits the event, unless the request has ended."""
        if self.finished.done():
            return
        try:
            self._sink.emit(event)
        except EngineError as error:
            self.fail(error)
            return
        self._unfinished -= isinstance(event, GenerationResponseSample)
        if not self._unfinished:
            self.finished.set_result(None)

    def fail(self, error: Exception) -> None:
        """Ends the request with the error, unless the request has ended."""
        if not self.finished.done():
            self.finished.set_exception(error)
