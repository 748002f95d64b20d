"""Decides which endpoint of a directory a call goes to, for both clients.

Nothing here waits, locks or reads a clock: callers pass `now`, in seconds of `time.monotonic()`.
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
"""Age in seconds from which a reading of the directory is renewed. Calls still use the old reading meanwhile."""

MIN_READ_INTERVAL_SECONDS: Final = 1.0
"""Minimum seconds between the starts of two readings of the directory, however many calls ask for one."""

MAX_AGE_SECONDS: Final = 60.0
"""Age in seconds from which calls wait for a new reading: after a long idle time, the old endpoints may be gone."""

FAILURE_COOLDOWN_SECONDS: Final = 5.0
"""Seconds for which a failed endpoint is used only if there is no other."""

WARMUP_SECONDS: Final = 0.3
"""Seconds for which calls wait for more endpoints after the first one has answered, so that it does not get them all."""

MIN_SECONDS_FOR_WARMUP: Final = 3.0
"""Calls with fewer seconds than this until their deadline do not wait for more endpoints."""

ENDPOINT_GONE_ERRORS: Final = (UnavailableError, CallCancelledError)
"""How calls end on an endpoint that stops. grpc cancels calls that arrive at the last moment, before the server sees them."""


class Directory(Protocol):
    """Publishes the addresses of the endpoints of a service."""

    async def read(self) -> Collection[str]:
        """Returns the addresses, most likely to be live first; raises `FlywheelError` if it cannot read them."""

    def no_endpoint(self) -> FlywheelError:
        """Returns the error of a call if the last reading found no endpoint."""


@dataclass(slots=True, eq=False)
class Member(Generic[ChannelT]):
    """An endpoint in the pool: its channel and its state."""

    address: str
    channel: ChannelT
    listed: bool = True
    """Whether the last reading of the directory lists the endpoint."""
    answers: bool = False
    """Whether the endpoint has answered a probe, and no call has failed there since."""
    probing: bool = False
    calls: int = 0
    """How many calls of this client run there."""
    last_pick: int = 0
    failed_at: float = -inf
    """In seconds of `time.monotonic()`."""


class Pool(Generic[ChannelT]):
    """Holds the endpoints that calls may go to, each with a channel, and dropped endpoints until their last call has ended.

    A reading of the directory adds endpoints. Each endpoint is probed, several at the same time. An endpoint that does not
    answer is dropped until another reading lists it. An endpoint that is not listed any more is dropped once a listed endpoint
    answers. So an empty or unreadable directory removes no endpoint that works.

    A call goes to the endpoint with the fewest calls of this client, and in turn among equals.
    Plain round robin would pile up long calls on one endpoint, because a generation lasts from a moment to minutes.
    """

    def __init__(self, open_channel: Callable[[str], ChannelT]) -> None:
        self._open_channel = open_channel
        self._members: dict[str, Member[ChannelT]] = {}
        self._dropped: set[Member[ChannelT]] = set()
        self._read_at = -inf
        self._read_began_at = -inf
        self._warmup_ends = -inf
        self._picks = 0
        self.probe_error: FlywheelError | None = None
        """The error of the last endpoint that was dropped because it did not answer; None after each reading."""

    def needs_refresh(self, now: float) -> bool:
        """Returns whether the directory should be read again."""
        return now - self._read_at >= REFRESH_AFTER_SECONDS

    def is_usable(self, now: float) -> bool:
        """Returns whether the last reading is recent enough for calls not to wait for a new one."""
        return now - self._read_at <= MAX_AGE_SECONDS

    def begin_read(self, now: float) -> float:
        """Records the start of a reading, and returns the seconds to wait before the directory may be asked."""
        begun = max(now, self._read_began_at + MIN_READ_INTERVAL_SECONDS)
        self._read_began_at = begun
        return begun - now

    def pick(self, tries: Tries, now: float) -> Member[ChannelT] | None:
        """Returns the endpoint for the next try, and counts a call there; None if there is no endpoint, or none yet."""
        untried = self._untried(tries)
        # A single untried endpoint needs no probe: the call itself shows whether it answers.
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
        """Returns the most seconds to wait for a probe before the next `pick`; None if there is nothing to wait for."""
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
        """Records a failed try, and returns whether the endpoint was to blame, and not the call."""
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and not any(error.trailing_metadata() or ()):
            # The server itself would have sent metadata. It may be silent, so it gets no more calls until it answers a probe.
            member.answers = False
        if not isinstance(error_from_call(error, ""), ENDPOINT_GONE_ERRORS):
            return False
        member.answers = False
        member.failed_at = now
        self._read_at = min(self._read_at, now - REFRESH_AFTER_SECONDS)  # the directory is to be read again
        tries.error = error
        tries.failed.add(member.address)
        return True

    def release(self, member: Member[ChannelT]) -> ChannelT | None:
        """Records the end of a try. Returns the channel if that was the last call of a dropped endpoint."""
        member.calls -= 1
        if member.calls or member not in self._dropped:
            return None
        self._dropped.discard(member)
        return member.channel

    def update(self, addresses: Iterable[str], now: float) -> list[ChannelT]:
        """Takes a reading of the directory, and returns the channels to close."""
        if not self.is_usable(now):
            for member in self._members.values():
                member.answers = False
        self._read_at = now
        self.probe_error = None
        listed = dict.fromkeys(addresses)
        for member in self._members.values():
            member.listed = member.address in listed
        for address in listed:
            if address not in self._members:
                self._members[address] = Member(address, self._open_channel(address))
        return self._drop_unlisted()

    def record_unreadable(self, now: float) -> None:
        """Records that the directory could not be read, so that the last reading, if any, stays in use for longer."""
        if self._members:
            self._read_at = now

    def begin_probes(self) -> list[Member[ChannelT]]:
        """Returns the endpoints to probe now. The caller must call `record_probe` for each of them."""
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
        not_serving: bool,
    ) -> list[ChannelT]:
        """Records the result of a probe, and returns the channels to close.

        Args:
            member: The endpoint.
            no_answer: Why the endpoint does not answer; None if it does.
            now: The current time in seconds of `time.monotonic()`.
            not_serving: Whether the endpoint answers that it refuses calls.
        """
        member.probing = False
        if self._members.get(member.address) is not member:
            return []
        if no_answer is not None:
            self.probe_error = no_connection(member.address, no_answer)
            return self._drop([member])
        if not any(other.answers for other in self._members.values()):
            self._warmup_ends = now + WARMUP_SECONDS
        member.answers = True
        if not_serving:
            member.failed_at = now  # as after a failed call, others are preferred for a while
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
