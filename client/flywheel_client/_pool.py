"""Which endpoint a call goes to if a service has several: the decisions that both clients share.

Nothing here waits, locks, or looks at a clock: `now` is the caller's, in seconds of `time.monotonic()`.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from math import inf
from typing import Any, Final, Generic, Protocol, TypeVar

import grpc

from flywheel_client._errors import CallCancelledError, FlywheelError, UnavailableError, error_from_call, no_connection
from flywheel_client._health import MAX_PROBES
from flywheel_client._retry import Tries

ChannelT = TypeVar("ChannelT")

REFRESH_AFTER_SECONDS: Final = 10.0
"""Seconds for which a reading of the directory holds. An older one still serves while it is renewed."""

MIN_READ_INTERVAL_SECONDS: Final = 1.0
"""Seconds from the beginning of a reading to that of the next, also while calls fail, of which each wants a new one."""

MAX_AGE_SECONDS: Final = 60.0
"""Seconds after which a call waits for the renewal: a client that was idle for long should not try what is long gone."""

FAILURE_COOLDOWN_SECONDS: Final = 5.0
"""Seconds for which an endpoint that has failed is the last choice."""

WARMUP_SECONDS: Final = 0.3
"""Seconds for which calls wait for further endpoints after the first has answered, so that not all of them go to that one."""

MIN_SECONDS_FOR_WARMUP: Final = 3.0
"""Calls whose deadline is nearer than so many seconds do not wait for further endpoints."""

ENDPOINT_GONE_ERRORS: Final = (UnavailableError, CallCancelledError)
"""How calls end on an endpoint that stops; with the latter, those that arrive at the last moment, before any code sees them."""


class Directory(Protocol):
    """Where the endpoints of a service are published."""

    async def read(self) -> Collection[str]:
        """Returns their addresses, the likeliest to be live first; raises `FlywheelError` if it cannot tell."""

    def no_endpoint(self) -> FlywheelError:
        """Returns what to tell a caller if the last reading found none."""


@dataclass(slots=True, eq=False)
class Member(Generic[ChannelT]):
    """One endpoint, its channel, and how it does."""

    address: str
    channel: ChannelT
    listed: bool = True
    """Whether the last reading of the directory has it."""
    answers: bool = False
    """Whether it has answered a probe, and no call has failed there since."""
    probing: bool = False
    calls: int = 0
    last_pick: int = 0
    failed_at: float = -inf


class Pool(Generic[ChannelT]):
    """The endpoints that calls may go to, each with a channel, and those no longer wanted that still have calls.

    A reading of the directory adds endpoints. Each is probed, several at the same time, and one that does not answer is dropped
    until another reading lists it. One that is no longer listed is dropped once a listed one answers, so that a directory which
    is empty, or cannot be read, takes nothing away that works.

    A call goes to the endpoint with the fewest calls of this client, in turn if several have as few. Generations last
    from a moment to minutes, so that dealing them out in turn alone would pile up the long ones.
    """

    def __init__(self, open_channel: Callable[[str], ChannelT]) -> None:
        self._open_channel = open_channel
        self._members: dict[str, Member[ChannelT]] = {}
        self._dropped: set[Member[ChannelT]] = set()
        self._read_at = -inf
        self._read_began_at = -inf
        self._warmup_ends = -inf
        self._picks = 0
        self.refusal: FlywheelError | None = None
        """Why the last endpoint that did not answer was dropped, since the last reading."""

    def needs_refresh(self, now: float) -> bool:
        """Whether it is time to read the directory again."""
        return now - self._read_at >= REFRESH_AFTER_SECONDS

    def is_usable(self, now: float) -> bool:
        """Whether a call need not wait for a new reading."""
        return now - self._read_at <= MAX_AGE_SECONDS

    def begin_read(self, now: float) -> float:
        """Returns the seconds after which a new reading may ask the directory."""
        begun = max(now, self._read_began_at + MIN_READ_INTERVAL_SECONDS)
        self._read_began_at = begun
        return begun - now

    def pick(self, tries: Tries, now: float) -> Member[ChannelT] | None:
        """Returns the endpoint to try next, for which a call now counts; None if there is none, or none yet."""
        untried = self._untried(tries)
        # If only one is left, the call finds out by itself whether that one answers.
        able = untried if len(untried) == 1 else [member for member in untried if member.answers]
        warms_up = now < self._warmup_ends and tries.deadline - now > MIN_SECONDS_FOR_WARMUP
        if not able or (len(able) < len(untried) and warms_up):
            return None
        member = min(
            able,
            key=lambda each: (now - each.failed_at < FAILURE_COOLDOWN_SECONDS, not each.listed, each.calls, each.last_pick),
        )
        self._picks += 1
        member.last_pick = self._picks
        member.calls += 1
        return member

    def seconds_to_wait(self, tries: Tries, now: float) -> float | None:
        """Returns the seconds after which to pick again, if no probe ends before; None if there is nothing to wait for."""
        untried = self._untried(tries)
        if not untried:
            return None
        return self._warmup_ends - now if any(member.answers for member in untried) else inf

    def record_failure(
        self,
        tries: Tries,
        member: Member[ChannelT],
        error: Any,  # noqa: ANN401 - grpc has no public type for it
        now: float,
    ) -> bool:
        """Notes that a try of a call failed there, and returns whether the endpoint, rather than the call, was to blame."""
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and not any(error.trailing_metadata() or ()):
            # A word of the server would be there. It may be silent, so it has to answer a probe before it gets more calls.
            member.answers = False
        if not isinstance(error_from_call(error, ""), ENDPOINT_GONE_ERRORS):
            return False
        member.answers = False
        member.failed_at = now
        self._read_at = min(self._read_at, now - REFRESH_AFTER_SECONDS)
        tries.error = error
        tries.failed.add(member.address)
        return True

    def release(self, member: Member[ChannelT]) -> ChannelT | None:
        """Notes that a call ended, and returns the channel if that was the last call of an endpoint that was dropped."""
        member.calls -= 1
        if member.calls or member not in self._dropped:
            return None
        self._dropped.discard(member)
        return member.channel

    def update(self, addresses: Iterable[str], now: float) -> list[ChannelT]:
        """Takes a reading of the directory, and returns the channels that nobody needs any more."""
        if not self.is_usable(now):
            for member in self._members.values():
                member.answers = False
        self._read_at = now
        self.refusal = None
        listed = dict.fromkeys(addresses)
        for member in self._members.values():
            member.listed = member.address in listed
        for address in listed:
            if address not in self._members:
                self._members[address] = Member(address, self._open_channel(address))
        return self._drop_unlisted()

    def record_unreadable(self, now: float) -> None:
        """Notes that the directory could not be read: what it listed before, if anything, has to serve for longer."""
        if self._members:
            self._read_at = now

    def begin_probes(self) -> list[Member[ChannelT]]:
        """Returns the endpoints to probe now, each of which must be followed by `probed`."""
        free = MAX_PROBES - sum(member.probing for member in self._members.values())
        chosen = [member for member in self._members.values() if not member.answers and not member.probing][: max(free, 0)]
        for member in chosen:
            member.probing = True
        return chosen

    def record_probe(
        self,
        member: Member[ChannelT],
        no_answer: str | None,
        now: float,
        *,
        refuses: bool,
    ) -> list[ChannelT]:
        """Notes how a probe ended, and returns the channels that nobody needs any more.

        Args:
            member: The endpoint.
            no_answer: Why the endpoint does not answer; None if it does.
            now: The time.
            refuses: Whether the endpoint says that it will refuse calls.
        """
        member.probing = False
        if self._members.get(member.address) is not member:
            return []
        if no_answer is not None:
            self.refusal = no_connection(member.address, no_answer)
            return self._drop([member])
        if not any(other.answers for other in self._members.values()):
            self._warmup_ends = now + WARMUP_SECONDS
        member.answers = True
        if refuses:
            member.failed_at = now
        return self._drop_unlisted()

    def channels(self) -> list[ChannelT]:
        """Returns every channel that is open."""
        return [member.channel for member in (*self._members.values(), *self._dropped)]

    def _untried(self, tries: Tries) -> list[Member[ChannelT]]:
        return [member for member in self._members.values() if member.address not in tries.failed]

    def _drop_unlisted(self) -> list[ChannelT]:
        if not any(member.listed and member.answers for member in self._members.values()):
            return []
        return self._drop([member for member in self._members.values() if not member.listed])

    def _drop(self, members: Iterable[Member[ChannelT]]) -> list[ChannelT]:
        unneeded = []
        for member in members:
            del self._members[member.address]
            if member.calls:
                self._dropped.add(member)
            else:
                unneeded.append(member.channel)
        return unneeded
