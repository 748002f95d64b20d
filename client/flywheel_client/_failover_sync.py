"""A channel for threads to all endpoints of a directory: if the endpoint of a call is gone, the call fails over to another.

Endpoints are probed concurrently, and calls go only to endpoints that answer, so that a silent endpoint delays no call.
If an endpoint is gone or about to stop before the engine has begun on a call, the call tries another endpoint at once, within
its deadline and its number of attempts. When a call has tried all endpoints, it waits before it tries them again.
"""

import asyncio
import functools
import threading
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from typing import Any, Final

import grpc
from google.protobuf.wrappers_pb2 import StringValue

from flywheel_client._calls_sync import Call, RetryingChannel
from flywheel_client._errors import FlywheelError, deadline_exceeded
from flywheel_client._health import (
    HEALTH_CHECK,
    PROBE_TIMED_OUT,
    PROBE_TIMEOUT,
    health_request,
    health_response,
    is_not_serving,
    no_answer,
)
from flywheel_client._pool import Directory, Member, Pool
from flywheel_client._retry import Retry, Tries

CLOSE_POLL_SECONDS: Final = 0.05
"""Seconds between two checks, during a reading of the directory, whether the client was closed."""


@dataclass(slots=True)
class _Reading:
    """A reading of the directory, and its error if it has failed."""

    finished: bool = False
    error: BaseException | None = None


class FailoverChannel(RetryingChannel):
    """A channel that picks an endpoint for each call of a client."""

    grpc_waits = False

    def __init__(self, directory: Directory, open_channel: Callable[[str], grpc.Channel], retry: Retry | None) -> None:
        super().__init__(retry)
        self._directory = directory
        self._pool = Pool(open_channel)
        self._reading: _Reading | None = None

    def _channels(self) -> Collection[grpc.Channel]:
        return self._pool.channels()

    def pick(self, call: Call) -> Member[grpc.Channel]:
        """Returns the endpoint for the next try, which counts as in use until `release`.

        If there is no endpoint to try, raises the error of the last try, or else the error of the directory.
        """
        reading: _Reading | None = None
        with self._changed:
            while True:
                self.raise_if_cancelled(call)
                now = time.monotonic()
                # After its own reading, the call uses the pool even if that reading failed.
                pool_is_usable = reading is not None or self._pool.is_usable(now)
                if pool_is_usable and (member := self._pool.pick(call.tries, now)):
                    if self._pool.needs_refresh(now):
                        self._read()
                    return member
                if pool_is_usable and (seconds := self._pool.seconds_to_wait(call.tries, now)) is not None:
                    self._wait(call, seconds)
                elif reading is None and call.tries.may_reread:
                    reading = self._read()
                    while not reading.finished:
                        self._wait(call, inf)
                    # After an endpoint has failed, one new reading is enough for a round.
                    call.tries.may_reread = not call.tries.failed
                else:
                    call.tries.error = call.tries.error or self._pool.probe_error
                    raise call.tries.error or (reading and reading.error) or self._directory.no_endpoint()

    def _wait(self, call: Call, seconds: float) -> None:
        """Waits for a change of the pool, at most so many seconds; raises if the call ends meanwhile."""
        remaining = call.tries.remaining(time.monotonic())
        if remaining == 0:
            raise call.tries.error or deadline_exceeded(call.request_id)
        self._changed.wait(min(seconds, threading.TIMEOUT_MAX, inf if remaining is None else remaining))
        self.raise_if_cancelled(call)

    def record_failure(self, member: Member[grpc.Channel], tries: Tries, error: grpc.RpcError | FlywheelError) -> bool:
        """Records a failed try. Returns whether the endpoint is to blame, so that another one may be tried at once."""
        with self._changed:
            to_blame = self._pool.record_failure(tries, member, error, time.monotonic())
        self._probe()
        return to_blame

    def release(self, member: Member[grpc.Channel]) -> None:
        """Records the end of a try."""
        with self._changed:
            channel = self._pool.release(member)
        if channel is not None:
            self._close_soon([channel])

    def _close_soon(self, channels: Iterable[grpc.Channel]) -> None:
        for channel in channels:
            # This may be the channel's own thread, and closing the channel waits for that thread.
            threading.Thread(target=channel.close, daemon=True).start()

    def _probe(self) -> None:
        """Starts probes of the endpoints that need one, up to the limit of concurrent probes."""
        with self._changed:
            members = [] if self.is_closed else self._pool.begin_probes()
        for member in members:
            check = member.channel.unary_unary(HEALTH_CHECK, health_request, health_response)
            with suppress(ValueError):  # the channel was closed meanwhile
                probe = check.future(StringValue())
                # Not a deadline of grpc: grpc uses the wall clock, which may be wrong or change.
                timer = threading.Timer(PROBE_TIMEOUT, probe.cancel)
                timer.daemon = True
                timer.start()
                probe.add_done_callback(functools.partial(self._probed, member, timer))

    def _probed(self, member: Member[grpc.Channel], timer: threading.Timer, probe: Any) -> None:  # noqa: ANN401 - grpc has no public type for it
        timer.cancel()
        code = probe.code()
        reason = PROBE_TIMED_OUT if probe.cancelled() else no_answer(code, probe.details())
        not_serving = code is grpc.StatusCode.OK and is_not_serving(probe.result())
        with self._changed:
            unneeded = self._pool.record_probe(member, reason, time.monotonic(), not_serving=not_serving)
            self._changed.notify_all()
        self._close_soon(unneeded)
        self._probe()

    def _read(self) -> _Reading:
        """Starts reading the directory; returns the current reading if there is one."""
        if self._reading is None:
            reading = _Reading()
            # Not a daemon thread: at exit, that would run on while the libraries that it uses are torn down.
            threading.Thread(target=self._read_in_thread, args=(reading,)).start()
            self._reading = reading
        return self._reading

    async def _read_unless_closed(self) -> Collection[str]:
        reading = asyncio.ensure_future(self._read_in_turn())
        while not reading.done():
            await asyncio.wait({reading}, timeout=CLOSE_POLL_SECONDS)
            if self.is_closed:
                reading.cancel()
        return reading.result()

    async def _read_in_turn(self) -> Collection[str]:
        with self._changed:
            delay = self._pool.begin_read(time.monotonic())
        await asyncio.sleep(delay)
        return await self._directory.read()

    def _read_in_thread(self, reading: _Reading) -> None:
        unneeded: list[grpc.Channel] = []
        try:
            addresses = asyncio.run(self._read_unless_closed())
            with self._changed:
                if not self.is_closed:
                    unneeded = self._pool.update(addresses, time.monotonic())
        except BaseException as error:  # noqa: BLE001 - `pick` raises it in the calls that wait
            reading.error = error
        with self._changed:
            if reading.error is not None:
                self._pool.record_unreadable(time.monotonic())
            reading.finished = True
            self._reading = None
            self._changed.notify_all()
        self._probe()
        self._close_soon(unneeded)
