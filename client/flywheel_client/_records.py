"""Reads the records in which a deployment on Modal publishes its addresses, and decides which addresses to use.

A container of `Gateway` has a tunnel. It puts the tunnel's address into a `modal.Dict` of its app, under the container's id, as
`{"app": …, "address": "host:port", "started": …, "refreshed": …, "refreshes": …}`. It refreshes this record every 20 s, and
removes it when it ends. So a record that has stopped changing belongs to a container that was killed or cannot reach Modal.
The address of a `GatewayServer` never changes. Both speak TLS, with certificates of public authorities.

The times in a record are by the container's clock. They are never compared with the clock of this machine.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeGuard

DEFAULT_APP: Final = "flywheel-grpc"
"""The name of the app, unless its deployment sets another name."""

STALE_AFTER_SECONDS: Final = 90.0
"""Seconds without a change, by the reader's clock, after which a record is stale."""

MAX_RECORDS: Final = 1000
"""The most records that are read from one Dict."""

_MAX_NAME_LENGTH: Final = 256
_MAX_PORT: Final = 65535
_MAX_TIME_SECONDS: Final = 1e11
"""Seconds since the epoch: a time beyond the year 5000, small enough to compute with."""

# A host name or IP address with a port, and no other target of grpc, such as unix:/path.
_ADDRESS: Final = re.compile(r"(?:[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An address of a deployment on Modal, which speaks TLS. Times are seconds since the epoch, by the container's clock.

    The kind `server` is the shared address of all containers of a `GatewayServer`, so its container and times are None.
    """

    address: str
    kind: Literal["tunnel", "server"]
    container: str | None
    started: float | None
    refreshed: float | None


@dataclass(frozen=True, slots=True)
class Record:
    """The record that one container has published."""

    endpoint: Endpoint
    progress: tuple[float, int]
    """The time and number of refreshes, which change with each refresh. Older gateways do not count their refreshes."""


def dict_name(app: str) -> str:
    """Returns the name of the `modal.Dict` with the records of an app."""
    return f"{app}-endpoints"


def record_from(container: object, value: object, app: str) -> Record | None:
    """Returns the record in an item of the Dict; None if the item is not a record, or a record of another app."""
    if not isinstance(container, str) or len(container) > _MAX_NAME_LENGTH or type(value) is not dict:
        return None
    match value:
        case {"app": str(named), "address": str(address), "started": started, "refreshed": refreshed} if (
            named == app and is_address(address) and _is_time(started) and _is_time(refreshed)
        ):
            endpoint = Endpoint(address, "tunnel", container, started, refreshed)
            refreshes = value.get("refreshes")
            return Record(endpoint, (refreshed, refreshes if type(refreshes) is int else 0))
    return None


def is_address(address: str) -> bool:
    """Returns whether this is a host and a port."""
    found = _ADDRESS.fullmatch(address) if len(address) <= _MAX_NAME_LENGTH else None
    return found is not None and 0 < int(found[1]) <= _MAX_PORT


def _is_time(value: Any) -> TypeGuard[float]:  # noqa: ANN401 - anything can be stored
    return type(value) in {int, float} and 0 <= value <= _MAX_TIME_SECONDS


@dataclass(frozen=True, slots=True)
class Reading:
    """The items of the Dict. If the reading is not complete, some items could not be read."""

    items: Sequence[tuple[object, object]]
    complete: bool = True


class RecordTracker:
    """Remembers the records between readings, and since when each record has not changed.

    Nothing here reads a clock: callers pass `now`, in seconds of `time.monotonic()`.
    """

    def __init__(self) -> None:
        self._seen: dict[str, tuple[Record, float]] = {}

    def update(self, reading: Reading, app: str, now: float) -> None:
        """Takes a reading of the Dict. For an invalid item, the last valid record of its container stays."""
        seen = {} if reading.complete else self._seen.copy()
        for container, value in reading.items:
            record = record_from(container, value, app)
            before = self._seen.get(container) if isinstance(container, str) else None
            if record is None:
                if before is not None:
                    seen[before[0].endpoint.container or ""] = before
            elif before is not None and before[0] == record:
                seen[str(container)] = before
            else:
                seen[str(container)] = record, now
        self._seen = seen

    def endpoints(self, now: float) -> list[Endpoint]:
        """Returns the endpoints of the last reading, most recently refreshed first, by the clocks of their containers.

        Leaves out stale endpoints, unless all are stale: then the containers may just be unable to reach Modal.
        """
        fresh = [record for record, since in self._seen.values() if now - since <= STALE_AFTER_SECONDS]
        chosen = fresh or [record for record, _ in self._seen.values()]
        chosen.sort(key=lambda record: record.progress, reverse=True)
        unique: dict[str, Endpoint] = {}
        for record in chosen:
            unique.setdefault(record.endpoint.address, record.endpoint)
        return list(unique.values())
