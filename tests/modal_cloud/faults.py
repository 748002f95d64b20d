"""Faults of single RPCs on their way: statuses, limits and delays."""

import asyncio
import random
import time
from dataclasses import dataclass
from typing import Any, Literal

from grpclib import GRPCError, Status
from modal_proto import api_pb2

Side = Literal["clients", "containers", "both"]


@dataclass(eq=False)
class Fault:
    """What befalls some RPCs until `end()`.

    Attributes:
        rpcs: Their names; none stands for all.
        side: Who makes them.
        status: What they fail with; None where they are only delayed.
        message: What the status says.
        delay: Seconds that each takes longer.
        share: How many of them it befalls, as a fraction drawn for each.
        times: How many of them it befalls at most; None for any number.
        per_second: How many pass in a second: it befalls those beyond. None where none passes.
        retry_after: Seconds after which Modal asks the client to repeat the RPC, as it does where it limits them; None where
            it does not ask.
        of_answers: Whether Modal does what the RPC asks for first, so that only its answer is lost or late. Not for RPCs with
            more than one answer.
    """

    rpcs: frozenset[str] = frozenset()
    side: Side = "clients"
    status: Status | None = None
    message: str = ""
    delay: float = 0.0
    share: float = 1.0
    times: int | None = None
    per_second: float | None = None
    retry_after: float | None = None
    of_answers: bool = False
    befallen: int = 0
    """How many RPCs it has befallen so far."""
    _ended: bool = False
    _passes: float = 1.0
    _counted: float = 0.0

    def end(self) -> None:
        """Lets all RPCs pass from now on."""
        self._ended = True

    def strikes(self, rpc: str, *, of_a_container: bool) -> bool:
        """Whether it befalls this RPC, which then counts."""
        if self._ended or (self.rpcs and rpc not in self.rpcs):
            return False
        if self.side != "both" and (self.side == "containers") != of_a_container:
            return False
        if self.times is not None and self.befallen >= self.times:
            return False
        if self._within_the_limit() or random.random() >= self.share:
            return False
        self.befallen += 1
        return True

    def _within_the_limit(self) -> bool:
        if self.per_second is None:
            return False
        now = time.monotonic()
        self._passes = min(max(1.0, self.per_second), self._passes + (now - self._counted) * self.per_second)
        self._counted = now
        if self._passes < 1:
            return False
        self._passes -= 1
        return True

    async def befall(self) -> None:
        """Returns after the delay, or raises `GRPCError` then."""
        if self.delay:
            await asyncio.sleep(self.delay)
        if self.status is not None:
            details: list[Any] = []
            if self.retry_after is not None:
                details.append(api_pb2.RPCRetryPolicy(retry_after_secs=self.retry_after))
            raise GRPCError(self.status, self.message, details)


class Faults:
    """The faults that are set: each RPC meets them in turn."""

    def __init__(self) -> None:
        self._set: list[Fault] = []

    def add(self, fault: Fault) -> Fault:
        self._set.append(fault)
        return fault

    def clear(self) -> None:
        for fault in self._set:
            fault.end()
        self._set.clear()

    async def meet(self, rpc: str, *, of_a_container: bool, of_answers: bool = False) -> None:
        for fault in tuple(self._set):
            if fault.of_answers == of_answers and fault.strikes(rpc, of_a_container=of_a_container):
                await fault.befall()
