"""Checks the lease of a gateway that has calls in this container; see `engines.modal.lease`."""

import asyncio
from typing import Final

import modal

from flywheel_server.engines.modal.lease import lease_of
from flywheel_server.engines.modal.waits import modal_result

CHECK_INTERVAL: Final = 3.5
"""Seconds between two checks of the lease. A gateway renews it a little more often."""

MAX_MISSED_RENEWALS: Final = 4
"""Checks in a row without a renewal after which the gateway counts as lost: 14 s. A check that fails does not count."""


class Lease:
    """The lease of the gateway that reads a partition of a queue."""

    def __init__(self, queue: modal.Queue, partition: str) -> None:
        self._queue = queue
        self._partition = partition
        self._lease = lease_of(partition)
        self._seen: int | None = None
        self._unchanged = 0
        self._put = 0
        """Items that this container has put into the partition for events since renewals seem to have stopped."""
        self._checked_at = float("-inf")

    @property
    def has_expired(self) -> bool:
        """Whether the gateway counts as lost."""
        return self._unchanged >= MAX_MISSED_RENEWALS

    def restart(self) -> None:
        """Resets the count of missed renewals: a gateway without calls does not renew its lease."""
        self._unchanged = 0

    def note_put(self, items: int) -> None:
        """Counts items that this container has put into the partition for events."""
        self._put += items

    async def check(self) -> None:
        """Checks whether the lease was renewed, unless it was checked just now. A gateway without a lease is never lost."""
        now = asyncio.get_running_loop().time()
        if self._lease is None or now - self._checked_at < CHECK_INTERVAL / 2:
            return
        self._checked_at = now
        try:
            renewals = await modal_result(self._queue.len.aio(partition=self._lease))
            unchanged = self._unchanged + 1 if renewals == self._seen else 0
            if unchanged == MAX_MISSED_RENEWALS and await self._is_read():
                unchanged = 0  # the gateway reads its events, but cannot renew the lease
        except Exception:  # noqa: BLE001 - Modal cannot be reached, or throttles: this says nothing about the gateway
            return
        self._seen, self._unchanged = renewals, unchanged
        if unchanged < MAX_MISSED_RENEWALS // 2:
            self._put = 0

    async def _is_read(self) -> bool:
        # Every container puts an item every few seconds, so with several containers the partition may never be empty.
        put = self._put
        waiting: int = await modal_result(self._queue.len.aio(partition=self._partition))
        return waiting < max(put, 1)
