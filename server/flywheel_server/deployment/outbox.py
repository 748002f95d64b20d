"""What many generations send through a `modal.Queue` at a time, with as few requests to Modal as possible."""

import asyncio
from typing import Any, Final

import modal

from flywheel_server.engines.base import EngineUnavailableError

PARTITION_TTL: Final = 3600
"""Seconds after which Modal clears what nobody has read, because the gateway that asked for it has gone."""

PUT_TIMEOUT: Final = 60.0
"""Seconds that a full queue is waited for: it is full when nobody reads it, and then there is nobody to generate for."""


class Outbox:
    """Puts items into a partition of a queue, in their order: what comes while a request is under way goes with the next."""

    def __init__(self, queue: modal.Queue, partition: str) -> None:
        self._queue = queue
        self._partition = partition
        self._items: list[Any] = []
        self._sent: asyncio.Future[None] | None = None
        self._sending: asyncio.Task[None] | None = None

    async def send(self, item: Any) -> None:  # noqa: ANN401 - whatever can be pickled
        """Returns when the item is in the queue; raises `EngineUnavailableError` where that cannot be."""
        self._items.append(item)
        if self._sent is None:
            self._sent = asyncio.get_running_loop().create_future()
        if self._sending is None or self._sending.done():
            self._sending = asyncio.create_task(self._send())
        await asyncio.shield(self._sent)

    async def _send(self) -> None:
        while self._sent is not None:
            items, sent = self._items, self._sent
            self._items, self._sent = [], None
            try:
                await self._queue.put_many.aio(
                    items, timeout=PUT_TIMEOUT, partition=self._partition, partition_ttl=PARTITION_TTL
                )
            except Exception as error:  # noqa: BLE001 - of Modal, of its transport, or because the queue is full
                sent.set_exception(EngineUnavailableError(f"events not sent: {type(error).__name__}"))
                sent.exception()  # those who sent may all have gone
            else:
                sent.set_result(None)
