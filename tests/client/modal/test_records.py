"""Which records of a deployment on Modal count."""

from __future__ import annotations

import pytest
from flywheel_client import Endpoint
from flywheel_client._records import DEFAULT_APP, STALE_AFTER_SECONDS, Reading, RecordTracker, is_address, record_from

from tests.client.modal.records import GARBAGE, LIVE, NO_ADDRESSES, NOW


@pytest.mark.parametrize(
    "address",
    ["r1.modal.host:443", "localhost:1", "127.0.0.1:65535", "[::1]:50051", "a_b.c-d:8", "h:1"],
)
def test_addresses(address: str) -> None:
    assert is_address(address)


@pytest.mark.parametrize("address", NO_ADDRESSES)
def test_no_addresses(address: str) -> None:
    assert not is_address(address)


@pytest.mark.parametrize("kind", GARBAGE)
def test_no_records(kind: str) -> None:
    assert record_from("ta-1", GARBAGE[kind], DEFAULT_APP) is None


@pytest.mark.parametrize("container", [7, None, b"ta-1", ("ta", 1), "t" * 1000])
def test_no_containers(container: object) -> None:
    assert record_from(container, LIVE, DEFAULT_APP) is None


@pytest.mark.parametrize("refreshes", [..., 0, 3, 10**30, "many", None])
def test_records_of_older_and_newer_gateways(refreshes: object) -> None:
    value = {**LIVE, "refreshes": refreshes, "of a later version": [1]}
    if refreshes is ...:
        del value["refreshes"]
    found = record_from("ta-1", value, DEFAULT_APP)
    assert found is not None
    assert found.endpoint == Endpoint("a:1", "tunnel", "ta-1", NOW - 100, NOW - 50)


def addresses(tracker: RecordTracker, now: float) -> list[str]:
    return [endpoint.address for endpoint in tracker.endpoints(now)]


@pytest.mark.parametrize("offset", [-3600.0, -600.0, -100.0, 0.0, 100.0, 600.0, 3600.0])
@pytest.mark.parametrize("counts", [True, False])
def test_a_record_counts_for_as_long_as_it_changes(offset: float, counts: bool) -> None:
    """The clock of the writer does not matter. Gateways count their refreshes, but older ones do not."""

    def written(address: str, moment: float, clock: float) -> dict[str, object]:
        value = {**LIVE, "address": address, "refreshed": NOW + moment + clock, "refreshes": int(moment)}
        if not counts:
            del value["refreshes"]
        return value

    tracker = RecordTracker()
    for moment in range(0, 3600, 20):
        items = [("ta-1", written("living:1", moment, offset)), ("ta-2", written("killed:1", min(moment, 100), -offset))]
        tracker.update(Reading(items), DEFAULT_APP, moment)
        expected = {"living:1"} if moment - 100 > STALE_AFTER_SECONDS else {"living:1", "killed:1"}
        assert set(addresses(tracker, moment)) == expected


def test_if_no_record_changes_all_count() -> None:
    tracker = RecordTracker()
    items = [("ta-1", LIVE), ("ta-2", {**LIVE, "address": "b:2"})]
    for moment in (0.0, 10.0, 10_000.0):
        tracker.update(Reading(items), DEFAULT_APP, moment)
        assert set(addresses(tracker, moment)) == {"a:1", "b:2"}


@pytest.mark.parametrize("kind", GARBAGE)
def test_an_invalid_item_stands_for_the_last_valid_record(kind: str) -> None:
    tracker = RecordTracker()
    tracker.update(Reading([("ta-1", LIVE), ("ta-2", {**LIVE, "address": "b:2"})]), DEFAULT_APP, 0.0)
    tracker.update(Reading([("ta-1", GARBAGE[kind]), ("ta-2", {**LIVE, "address": "b:2"})]), DEFAULT_APP, 10.0)
    assert set(addresses(tracker, 10.0)) == {"a:1", "b:2"}


def test_the_same_address_twice() -> None:
    tracker = RecordTracker()
    tracker.update(
        Reading([("ta-1", LIVE), ("ta-2", {**LIVE, "refreshed": NOW}), ("ta-3", {**LIVE, "refreshed": NOW - 99})]),
        DEFAULT_APP,
        0.0,
    )
    assert [(it.address, it.container) for it in tracker.endpoints(0.0)] == [("a:1", "ta-2")]
