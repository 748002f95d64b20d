"""A channel to all endpoints of a directory, for threads: each call to one of them, and to another if that one is gone.

A call that finds its endpoint gone, or about to stop, before it has delivered anything is tried elsewhere, within its
deadline. Whatever has delivered something is never repeated: the caller may have used it.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import grpc

from flywheel_client._errors import FlywheelError, call_cancelled, deadline_exceeded, request_id_in
from flywheel_client._pool import Directory, Member, Pool, Tries

T = TypeVar("T")
Metadata = Sequence[tuple[str, str | bytes]]

CLOSING: Final = 0.05
"""Seconds after which a reading of the directory ends at the latest once the client is closed."""


@dataclass(slots=True)
class _Reading:
    """A reading of the directory that is under way, and then how it ended."""

    finished: bool = False
    error: BaseException | None = None


class FailoverChannel:
    """What the clients and the generated stubs use of a `grpc.Channel`.

    Nothing of grpc is called while the lock is held: grpc has locks of its own, and calls back.
    """

    def __init__(self, directory: Directory, open_channel: Callable[[str], grpc.Channel]) -> None:
        self._directory = directory
        self._pool = Pool(open_channel)
        self._changed = threading.Condition()
        self._reading: _Reading | None = None
        self._closed = False

    def unary_unary(self, *method: Any, **options: Any) -> "_Method":  # noqa: ANN401 - those of `grpc.Channel`
        """Returns a method that is answered with one message."""
        return _Method(self, lambda channel: channel.unary_unary(*method, **options).future)

    def unary_stream(self, *method: Any, **options: Any) -> "_Method":  # noqa: ANN401 - those of `grpc.Channel`
        """Returns a method that is answered with a stream."""
        return _Method(self, lambda channel: channel.unary_stream(*method, **options))

    def close(self) -> None:
        """Closes all channels, which cancels the calls under way."""
        with self._changed:
            self._closed = True
            channels = self._pool.channels()
            self._changed.notify_all()
        for channel in channels:
            channel.close()

    def pick(self, call: "_Call") -> Member[grpc.Channel]:
        """Returns the endpoint to try next, which counts as in use until `ended`.

        Raises what the call ends with where there is none: the error of its last try, or one of the directory.
        """
        with self._changed:
            self.raise_if_cancelled(call)
            now = time.monotonic()
            member = self._pool.pick(call.tries, now)
            if member is not None:
                if self._pool.is_old(now):
                    self._read()
                return member
            error: BaseException | None = None
            if call.tries.may_reread:
                reading = self._read()
                self._changed.wait_for(lambda: reading.finished or call.cancelled or self._closed, call.tries.remaining(now))
                self.raise_if_cancelled(call)
                if not reading.finished:
                    raise deadline_exceeded(call.request_id)
                error = reading.error
                member = self._pool.pick_after_reading(call.tries, time.monotonic())
        if member is None:
            raise call.tries.error or error or self._directory.no_endpoint()
        return member

    def failed(self, call: "_Call", member: Member[grpc.Channel], error: grpc.RpcError) -> bool:
        """Notes that a try failed there, and returns whether the endpoint, rather than the call, was to blame."""
        with self._changed:
            self.raise_if_cancelled(call)
            return self._pool.failed(call.tries, member, error, time.monotonic())

    def ended(self, member: Member[grpc.Channel]) -> None:
        """Notes that a try is over."""
        with self._changed:
            channel = self._pool.ended(member)
        if channel is not None:
            # Not here, which may be the channel's own thread: closing it waits for that.
            threading.Thread(target=channel.close, daemon=True).start()

    def raise_if_cancelled(self, call: "_Call") -> None:
        """Raises `CallCancelledError` where the call was cancelled, or the channel closed."""
        if call.cancelled or self._closed:
            raise call_cancelled(call.request_id)

    def wake(self) -> None:
        """Lets calls that wait for the directory see that they were cancelled."""
        with self._changed:
            self._changed.notify_all()

    def _read(self) -> _Reading:
        """Begins to read the directory, or returns the reading that is under way."""
        if self._reading is None:
            reading = _Reading()
            # Not a daemon, which a process that ends would leave among the ruins of the libraries that it uses.
            threading.Thread(target=self._read_in_thread, args=(reading,)).start()
            self._reading = reading
        return self._reading

    async def _read_unless_closed(self) -> Collection[str]:
        reading = asyncio.ensure_future(self._directory.read())
        while not reading.done():
            await asyncio.wait({reading}, timeout=CLOSING)
            if self._closed:
                reading.cancel()
        return reading.result()

    def _read_in_thread(self, reading: _Reading) -> None:
        unneeded: list[grpc.Channel] = []
        try:
            addresses = asyncio.run(self._read_unless_closed())
            with self._changed:
                if not self._closed:
                    unneeded = self._pool.update(addresses, time.monotonic())
        except BaseException as error:  # noqa: BLE001 - raised to whoever waits for the reading
            reading.error = error
        with self._changed:
            if reading.error is not None:
                self._pool.keep(time.monotonic())
            reading.finished = True
            self._reading = None
            self._changed.notify_all()
        for channel in unneeded:
            channel.close()


@dataclass(frozen=True, slots=True)
class _Method:
    """A method of the service, on whichever endpoint a call of it goes to."""

    channel: FailoverChannel
    of: Callable[[grpc.Channel], Callable[..., Any]]

    def __call__(self, request: object, timeout: float | None, metadata: Metadata) -> "_Call":
        return _Call(self, request, timeout, metadata)

    future = __call__


class _Call:
    """What the client uses of a call of grpc, be its answer one message or a stream."""

    def __init__(self, method: _Method, request: object, timeout: float | None, metadata: Metadata) -> None:
        self.tries = Tries.begin(timeout, time.monotonic())
        self.request_id = request_id_in(metadata, "")
        self.cancelled = False
        self._method = method
        self._request = request
        self._metadata = metadata
        self._delivered = False
        self._member: Member[grpc.Channel]
        self._current: Any = None
        self._error: FlywheelError | None = None
        try:
            self._try()
        except FlywheelError as error:
            # As with grpc, a call that fails says so when it is asked for its result.
            self._error = error

    def __next__(self) -> Any:  # noqa: ANN401 - a message of the method
        return self._receive(next)

    def result(self) -> Any:  # noqa: ANN401 - a message of the method
        """Waits for the answer."""
        return self._receive(lambda call: call.result())

    def initial_metadata(self) -> Metadata | None:
        """Returns what the endpoint sent before its first message; call it after that has arrived."""
        metadata: Metadata | None = self._current.initial_metadata()
        return metadata

    def cancel(self) -> None:
        """Ends the call wherever it is: on an endpoint, between two of them, or waiting for the directory."""
        # In this order, which is the opposite of that in `_try`, so that one of the two sees what the other has set.
        self.cancelled = True
        current = self._current
        if current is None:
            self._method.channel.wake()
        else:
            current.cancel()

    def _receive(self, receive: Callable[[Any], T]) -> T:
        if self._error is not None:
            raise self._error
        while True:
            try:
                message = receive(self._current)
            except grpc.RpcError as error:
                if not self._method.channel.failed(self, self._member, error) or self._delivered:
                    raise
            else:
                self._delivered = True
                return message
            self._try()

    def _try(self) -> None:
        self._current = None
        channel = self._method.channel
        self._member = member = channel.pick(self)
        try:
            method = self._method.of(member.channel)
            current = method(self._request, timeout=self.tries.remaining(time.monotonic()), metadata=self._metadata)
        except BaseException:
            channel.ended(member)
            # Closing the channel between the two lines makes grpc raise a ValueError.
            channel.raise_if_cancelled(self)
            raise
        current.add_done_callback(lambda _: channel.ended(member))
        self._current = current
        if self.cancelled:
            current.cancel()
