"""Records of a deployment, right and wrong ones."""

from __future__ import annotations

import time
from typing import Any

from flywheel_client._records import DEFAULT_APP

WAIT = 60.0

NOW = 1_800_000_000.0


def record(address: str, age: float = 5.0, **more: Any) -> dict[str, Any]:
    now = time.time()
    return {"app": DEFAULT_APP, "address": address, "started": now - 3600.0, "refreshed": now - age, **more}


NO_ADDRESSES = (
    *("", "host", "host:", ":443", "host:0", "host:65536", "host:-1", "host:4x3", "host:443 ", " host:443", "host:443\n"),
    *("unix:/etc/passwd", "dns:///host:443", "ipv4:1.2.3.4:80,5.6.7.8:90", "https://host:443", "a,b:443", "user@host:443"),
    *("-host:443", "ho st:443", "hö.st:443", "host:٤٤٣", "host/path:443", "[host]:443", "::1:443", "h" * 300 + ":443"),
)

LIVE = {"app": DEFAULT_APP, "address": "a:1", "started": NOW - 100, "refreshed": NOW - 50, "refreshes": 3}

GARBAGE: dict[str, object] = {
    "nothing": None,
    "text": "a:1",
    "a number": 7,
    "a list": ["app", DEFAULT_APP],
    "an empty record": {},
    "other keys": {7: 7},
    "half a record": {"app": DEFAULT_APP, "address": "a:1"},
    "nobody's": {"address": "a:1", "started": NOW - 100, "refreshed": NOW - 50},
    "another app's": {**LIVE, "app": "other"},
    "an app of another type": {**LIVE, "app": 7},
    "an address of another type": {**LIVE, "address": ["a", 1]},
    "a time in words": {**LIVE, "refreshed": "yesterday"},
    "no time": {**LIVE, "started": None},
    "a time that is true": {**LIVE, "refreshed": True},
    "a time that is no number": {**LIVE, "refreshed": float("nan")},
    "an endless time": {**LIVE, "started": float("inf")},
    "a negative time": {**LIVE, "refreshed": -1.0},
    "a time beyond all": {**LIVE, "refreshed": 10**400},
    **{f"the address {address[:30]!r}": {**LIVE, "address": address} for address in NO_ADDRESSES},
}
