"""What a deployment on Modal publishes about its addresses, and which of them are worth a try.

A container of `Gateway` has a tunnel, whose address it puts into a `modal.Dict` of its app, under its own id, as
`{"app": …, "address": "host:port", "started": …, "refreshed": …, "refreshes": …}`. It refreshes this record every 20 s and
removes it when it ends, so that a record which no longer changes belongs to a container that was killed, or cannot reach Modal.
A `GatewayServer` has an address that stays. Both speak TLS, with certificates that everybody trusts.

The times in a record are those of the container's clock. They are never compared with the clock of this machine.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeGuard

DEFAULT_APP: Final = "flywheel-grpc"
"""The name of the app, unless its deployment chooses another one."""

STALE_AFTER_SECONDS: Final = 90.0
"""Seconds without a change, by the clock of whoever reads, after which a record is stale."""

MAX_RECORDS: Final = 1000
"""Records of one Dict that are looked at."""

_MAX_NAME_LENGTH: Final = 256
_MAX_PORT: Final = 65535
_MAX_TIME_SECONDS: Final = 1e11
"""Seconds since the epoch: beyond the year 5000, and within what can be computed with."""

# A name or an IP address and a port: none of the other targets that grpc understands, such as unix:/path.
_ADDRESS: Final = re.compile(r"(?:[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An address of a deployment on Modal, which speaks TLS. Times are seconds since the epoch, on the container's clock.

    A `server` is the one address of all containers of a `GatewayServer`, so it has no container and no times.
    """

    address: str
    kind: Literal["tunnel", "server"]
    container: str | None
    started: float | None
    refreshed: float | None


@dataclass(frozen=True, slots=True)
class Record:
    """What one container has published."""

    endpoint: Endpoint
    progress: tuple[float, int]
    """What changes with each refresh. Older gateways do not count their refreshes."""


def dict_name(app: str) -> str:
    """Returns the name of the `modal.Dict` with the records of an app."""
    return f"{app}-endpoints"


def record_from(container: object, value: object, app: str) -> Record | None:
    """Returns the record in an item of the Dict; None for the record of another app, and for what is no record at all."""
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
    """The items of the Dict, of which some may be missing because they could not be read."""

    items: Sequence[tuple[object, object]]
    complete: bool = True


class RecordTracker:
    """What a reader remembers from one reading to the next: the records, and since when each has not changed.

    Nothing here looks at a clock: `now` is the caller's, in seconds of `time.monotonic()`.
    """

    def __init__(self) -> None:
        self._seen: dict[str, tuple[Record, float]] = {}

    def update(self, reading: Reading, app: str, now: float) -> None:
        """Takes a reading of the Dict. An item that cannot be understood stands for the last one that could."""
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
        """Returns the endpoints of the last reading, those first that were refreshed last by their own clocks.

        Stale ones are left out, unless all are: then it may be Modal that cannot be reached by them.
        """
        fresh = [record for record, since in self._seen.values() if now - since <= STALE_AFTER_SECONDS]
        chosen = fresh or [record for record, _ in self._seen.values()]
        chosen.sort(key=lambda record: record.progress, reverse=True)
        unique: dict[str, Endpoint] = {}
        for record in chosen:
            unique.setdefault(record.endpoint.address, record.endpoint)
        return list(unique.values())
