"""A gateway's lease: a container gives up a gateway only if the gateway neither renews its lease nor reads its events."""

from typing import Any

import pytest
from flywheel_server.engines.modal.lease import MAX_MISSED_RENEWALS, Lease, lease_of, leased_partition


class Partitions:
    """A queue whose partitions have the given lengths."""

    def __init__(self, **lengths: int) -> None:
        self.lengths = lengths

    @property
    def len(self) -> Any:
        class Method:
            async def aio(_, partition: str) -> int:  # noqa: N805 - of another object
                return self.lengths[partition]

        return Method()


@pytest.mark.parametrize(("read", "others"), [(True, 0), (True, 5), (False, 0), (False, 5)])
async def test_a_gateway_that_reads_but_cannot_renew_is_not_lost(
    monkeypatch: pytest.MonkeyPatch, *, read: bool, others: int
) -> None:
    """Even if other containers put so much that nobody sees the partition empty."""
    monkeypatch.setattr("flywheel_server.engines.modal.lease.CHECK_INTERVAL", 0.0)
    partition = leased_partition()
    queue: Any = Partitions(**{partition: others, str(lease_of(partition)): 7})
    lease = Lease(queue, partition)
    for _ in range(3 * MAX_MISSED_RENEWALS):
        lease.note_put(3)
        if not read:
            queue.lengths[partition] += 3 + others
        await lease.check()
    assert lease.has_expired is not read


async def test_a_gateway_that_renews_no_lease_is_never_lost() -> None:
    queue: Any = None  # not used
    lease = Lease(queue, "the-partition-of-an-older-gateway")
    for _ in range(2 * MAX_MISSED_RENEWALS):
        await lease.check()
    assert not lease.has_expired


def test_the_names_of_partitions_are_within_the_limit_of_modal() -> None:
    partition = leased_partition()
    lease = lease_of(partition)
    assert lease is not None
    assert lease != partition
    assert max(len(partition), len(lease)) <= 64
    assert lease_of("0" * 32) is None
