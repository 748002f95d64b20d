"""How a container finds out that a gateway was killed: the gateway renews a lease while it has calls.

A lease is a partition of the gateway's queue. The gateway puts an item into it every few seconds. A container that works for
the gateway polls the length of the partition: each change is a renewal. So the clocks of two machines are never compared.
The name of the partition for events says whether there is a lease. Older gateways choose other names, and renew no lease.
"""

import asyncio
import uuid
from collections.abc import Callable
from typing import Final

import modal
import structlog

from flywheel_server.engines.modal.waits import modal_result

log = structlog.stdlib.get_logger(__name__)

RENEWAL_INTERVAL: Final = 3.0
"""Seconds between two renewals."""

RENEWAL_RETRY_DELAY: Final = 1.0
"""Seconds until a renewal that failed is retried."""

CHECK_INTERVAL: Final = 3.5
"""Seconds between two checks of the lease: a little more than between two renewals."""

MAX_MISSED_RENEWALS: Final = 4
"""Checks in a row without a renewal after which the gateway counts as lost: 14 s. A check that fails does not count."""

MAX_LEASE_ITEMS: Final = 100
"""How many items a lease holds before it is cleared. Modal does not tell the length of a partition with very many items."""

_LEASED: Final = "-leased"
_LEASE: Final = "-lease"


def leased_partition() -> str:
    """Returns a new name for a partition for events, within Modal's limit of 64 bytes."""
    return uuid.uuid4().hex + _LEASED


def lease_of(partition: str) -> str | None:
    """Returns the lease's partition for a partition for events; None if the gateway renews no lease."""
    return partition.removesuffix(_LEASED) + _LEASE if partition.endswith(_LEASED) else None


class LeaseRenewal:
    """Renews the lease of a partition for events."""

    def __init__(self, queue: modal.Queue, partition: str) -> None:
        self._queue = queue
        self._lease = lease_of(partition)
        self._renewed_at = float("-inf")
        self._renewals = 0

    async def renew_while(self, is_needed: Callable[[], bool]) -> None:
        """Renews the lease every `RENEWAL_INTERVAL` seconds, until `is_needed` returns False before a renewal."""
        loop = asyncio.get_running_loop()
        await asyncio.sleep(self._renewed_at + RENEWAL_INTERVAL - loop.time())
        while is_needed():
            try:
                if self._renewals % MAX_LEASE_ITEMS == MAX_LEASE_ITEMS - 1:
                    await modal_result(self._queue.clear.aio(partition=self._lease))
                await modal_result(self._queue.put.aio(None, block=False, partition=self._lease))
            except Exception as error:  # noqa: BLE001 - whatever the error, the next try may succeed
                log.debug("lease not renewed", error=f"{type(error).__name__}: {error}")
                await asyncio.sleep(RENEWAL_RETRY_DELAY)
            else:
                self._renewals += 1
                self._renewed_at = loop.time()
                await asyncio.sleep(RENEWAL_INTERVAL)


class Lease:
    """A container's view of the lease of the gateway that reads a partition for events."""

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
