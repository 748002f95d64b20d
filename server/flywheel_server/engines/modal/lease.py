"""How a container learns that a gateway was killed: the gateway renews a lease for as long as it has calls.

A lease is a partition of the gateway's queue. The gateway puts an item into it every few seconds. A container that works for
the gateway looks at the length of the partition: any change is a renewal. So no clock is compared with that of another machine.
The name of the partition for events says whether there is a lease: older gateways choose other names, and renew none.
"""

import uuid
from typing import Final

RENEWAL_INTERVAL: Final = 3.0
"""Seconds between two renewals."""

_LEASED: Final = "-leased"
_LEASE: Final = "-lease"


def leased_partition() -> str:
    """Returns a new name of a partition for events, within Modal's limit of 64 bytes."""
    return uuid.uuid4().hex + _LEASED


def lease_of(partition: str) -> str | None:
    """Returns the partition of the lease that belongs to a partition for events; None if its gateway renews none."""
    return partition.removesuffix(_LEASED) + _LEASE if partition.endswith(_LEASED) else None
