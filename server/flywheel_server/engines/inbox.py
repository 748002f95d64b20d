"""The events of all calls to a class on Modal, which come through one partition of a `modal.Queue`, handed to each call.

One partition for all, rather than one for each call, because then one request to Modal brings the events of many calls: the
more there is to do, the fewer requests it takes for each.
"""

import asyncio
import contextvars
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Final

import modal
import structlog

from flywheel_server.engines.base import EngineError, EngineUnavailableError
from flywheel_server.engines.remote_events import Pile

log = structlog.stdlib.get_logger(__name__)

MAX_PILES: Final = 500
"""How many piles one request brings at most."""

RETRY_INTERVAL: Final = 1.0
"""Seconds between two tries to read while Modal cannot be reached."""

Arrivals = asyncio.Queue[Any]
"""What arrives for one call: a `Pile`, an `EngineError`, or what the method returned."""


class Inbox:
    """Reads a partition of a queue from its making until `close()`; `queue` and `partition` are what senders need.

    The reading never pauses: a request that is cancelled may still take events out of the queue, and lose them.
    """

    def __init__(self, queue: modal.Queue, errors: Callable[[], AbstractContextManager[None]]) -> None:
        self.queue = queue
        self.partition = uuid.uuid4().hex
        self._errors = errors
        self._calls: dict[str, Arrivals] = {}
        # In no call's context: what it logs is of none.
        self._reading = asyncio.create_task(self._read(), context=contextvars.Context())

    @property
    def reads(self) -> bool:
        """Whether it is of use: not, when Modal no longer has the queue."""
        return not self._reading.done()

    async def close(self) -> None:
        """Stops reading."""
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)

    @contextmanager
    def receiving(self) -> Iterator[tuple[str, Arrivals]]:
        """Gives a new id for a call, and what arrives under it for the length of the context."""
        call = uuid.uuid4().hex
        arrivals = self._calls[call] = Arrivals()
        try:
            yield call, arrivals
        finally:
            del self._calls[call]

    async def _read(self) -> None:
        while True:
            try:
                with self._errors():
                    for data in await self.queue.get_many.aio(MAX_PILES, partition=self.partition):
                        self._hand_over(data)
            except EngineUnavailableError as error:
                # What was on its way may be lost; the calls see that by the numbers of their piles.
                log.warning("events not read", error=str(error))
                await asyncio.sleep(RETRY_INTERVAL)
            except EngineError as error:
                log.warning("events no longer read", error=str(error))
                for arrivals in self._calls.values():
                    arrivals.put_nowait(EngineUnavailableError("Modal no longer has the queue"))
                return

    def _hand_over(self, data: Any) -> None:  # noqa: ANN401 - what has come is to be found out
        arrivals = self._calls.get(data.get("call", "")) if isinstance(data, dict) else None
        if arrivals is None:
            return  # of a call that nobody waits for any more
        try:
            arrivals.put_nowait(Pile.unpack(data))
        except EngineError as error:
            arrivals.put_nowait(error)
