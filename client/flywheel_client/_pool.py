"""Which endpoint a call goes to where a service has several: the decisions that both clients share.

Nothing here waits, locks, or looks at a clock: `now` is the caller's, in seconds of `time.monotonic()`.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from math import inf
from typing import Any, Final, Generic, Protocol, TypeVar

import grpc

from flywheel_client._errors import FlywheelError
from flywheel_client._retry import Tries

ChannelT = TypeVar("ChannelT")

FRESH: Final = 10.0
"""Seconds for which a reading of the directory holds. An older one still serves while it is renewed."""

USABLE: Final = 60.0
"""Seconds after which a call waits for the renewal: a client that was idle for long should not try what is long gone."""

REST: Final = 5.0
"""Seconds for which an endpoint that has failed is the last choice."""

GONE: Final = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED})
"""How calls end on an endpoint that stops. CANCELLED is for those that arrive at the last moment, before any code sees them."""


class Directory(Protocol):
    """Where the endpoints of a service are published."""

    async def read(self) -> Collection[str]:
        """Returns the addresses of those that are live; raises `FlywheelError` where it cannot tell."""

    def no_endpoint(self) -> FlywheelError:
        """Returns what to tell a caller where the last reading found none."""


@dataclass(slots=True, eq=False)
class Member(Generic[ChannelT]):
    """One endpoint, its channel, and how it does."""

    address: str
    channel: ChannelT
    listed: bool = True
    calls: int = 0
    last_pick: int = 0
    failed: float = -inf


class Pool(Generic[ChannelT]):
    """The endpoints that the directory lists, each with a channel, and those no longer listed that still have calls.

    A call goes to the endpoint with the fewest calls of this client, in turn where several have as few. Generations last
    from a moment to minutes, so that dealing them out in turn alone would pile up the long ones.
    """

    def __init__(self, open_channel: Callable[[str], ChannelT]) -> None:
        self._open_channel = open_channel
        self._members: dict[str, Member[ChannelT]] = {}
        self._unlisted: set[Member[ChannelT]] = set()
        self._read = -inf
        self._picks = 0

    def is_old(self, now: float) -> bool:
        """Whether it is time to read the directory again."""
        return now - self._read >= FRESH

    def pick(self, tries: Tries, now: float) -> Member[ChannelT] | None:
        """Returns the endpoint to try next, for which a call now counts; None where the directory has to be read first."""
        return self._pick(tries, now) if now - self._read <= USABLE else None

    def pick_after_reading(self, tries: Tries, now: float) -> Member[ChannelT] | None:
        """Returns the endpoint to try next after the directory was read, or could not be; None where nothing is left."""
        if tries.failed:
            tries.may_reread = False
        return self._pick(tries, now)

    def _pick(self, tries: Tries, now: float) -> Member[ChannelT] | None:
        untried = [member for member in self._members.values() if member.address not in tries.failed]
        if not untried:
            return None
        member = min(untried, key=lambda each: (now - each.failed < REST, each.calls, each.last_pick))
        self._picks += 1
        member.last_pick = self._picks
        member.calls += 1
        return member

    def failed(
        self,
        tries: Tries,
        member: Member[ChannelT],
        error: Any,  # noqa: ANN401 - grpc has no public type for it
        now: float,
    ) -> bool:
        """Notes that a try of a call failed there, and returns whether the endpoint, rather than the call, was to blame."""
        if error.code() not in GONE:
            return False
        member.failed = now
        self._read = min(self._read, now - FRESH)
        tries.error = error
        tries.failed.add(member.address)
        return True

    def ended(self, member: Member[ChannelT]) -> ChannelT | None:
        """Notes that a call ended, and returns the channel if that was the last call of an endpoint no longer listed."""
        member.calls -= 1
        if member.listed or member.calls:
            return None
        self._unlisted.discard(member)
        return member.channel

    def update(self, addresses: Iterable[str], now: float) -> list[ChannelT]:
        """Takes a reading of the directory, and returns the channels that nobody needs any more."""
        self._read = now
        before = self._members
        self._members = {
            address: before.get(address) or Member(address, self._open_channel(address)) for address in dict.fromkeys(addresses)
        }
        unneeded = []
        for address, member in before.items():
            if address not in self._members:
                member.listed = False
                if member.calls:
                    self._unlisted.add(member)
                else:
                    unneeded.append(member.channel)
        return unneeded

    def keep(self, now: float) -> None:
        """Notes that the directory could not be read: what it listed before, if anything, has to serve for longer."""
        if self._members:
            self._read = now

    def channels(self) -> list[ChannelT]:
        """Returns every channel that is open."""
        return [member.channel for member in (*self._members.values(), *self._unlisted)]
