"""Whether a gateway that has calls here still lives, as its lease says; see `engines.modal.lease`."""

import asyncio
from typing import Final

import modal

from flywheel_server.engines.modal.lease import lease_of
from flywheel_server.engines.modal.waits import modal_result

LOOK_INTERVAL: Final = 3.5
"""Seconds between two looks at the lease. A gateway renews it a little more often."""

MAX_UNCHANGED: Final = 4
"""How many looks running may see no renewal until the gateway counts as lost: 14 s. A look that fails does not count."""


class Lease:
    """The lease of the gateway that reads a partition of a queue."""

    def __init__(self, queue: modal.Queue, partition: str) -> None:
        self._queue = queue
        self._partition = partition
        self._lease = lease_of(partition)
        self._seen: int | None = None
        self._unchanged = 0
        self._put = 0
        """How many items this container has put into the partition for events since a look that saw no renewal."""
        self._looked_at = float("-inf")

    @property
    def has_expired(self) -> bool:
        """Whether the gateway counts as lost."""
        return self._unchanged >= MAX_UNCHANGED

    def restart(self) -> None:
        """Forgets how often there was no renewal: a gateway without calls does not renew."""
        self._unchanged = 0

    def note_put(self, items: int) -> None:
        """Takes note that so many items were put into the partition for events."""
        self._put += items

    async def look(self) -> None:
        """Looks whether the lease was renewed, unless it has looked just now; a gateway that renews none is never lost."""
        now = asyncio.get_running_loop().time()
        if self._lease is None or now - self._looked_at < LOOK_INTERVAL / 2:
            return
        self._looked_at = now
        try:
            renewals = await modal_result(self._queue.len.aio(partition=self._lease))
            unchanged = self._unchanged + 1 if renewals == self._seen else 0
            if unchanged == MAX_UNCHANGED and await self._is_read():
                unchanged = 0  # somebody reads, who is kept from renewing
        except Exception:  # noqa: BLE001 - Modal is out of reach, or limits its requests, which says nothing of the gateway
            return
        self._seen, self._unchanged = renewals, unchanged
        if unchanged < MAX_UNCHANGED // 2:
            self._put = 0

    async def _is_read(self) -> bool:
        # It puts something every few seconds. Where several containers do, the partition may never be seen empty.
        put = self._put
        waiting: int = await modal_result(self._queue.len.aio(partition=self._partition))
        return waiting < max(put, 1)
