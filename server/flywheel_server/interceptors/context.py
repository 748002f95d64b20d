"""The context that a method of the servicer gets."""

import asyncio
from typing import Any, Final

import grpc
import grpc.aio

from flywheel_server.errors import CallStatus
from flywheel_server.grpc_types import GrpcContext
from flywheel_server.operations import Operation
from flywheel_server.telemetry.calls import CallRecord

REQUEST_ID: Final = "x-request-id"

SEND_TIMEOUT: Final = 1.0
"""Seconds to send the status of a failed call. Without a limit, a caller that does not read could block the call for ever."""


class CallContext:
    """Answers a call: with initial metadata when the work begins, with messages, and with a status if the call fails.

    Attributes:
        request_id: The request id of the call.
        record: The record of the call; None if nobody observes calls.
    """

    def __init__(self, context: GrpcContext, request_id: str, record: CallRecord | None = None) -> None:
        self.request_id = request_id
        self.record = record
        self._context = context
        self._sending_metadata: Operation[None] | None = None

    def begin(self) -> None:
        """Starts to send the initial metadata, which have the request id, and returns at once.

        Call it when the work begins, not earlier: gRPC and proxies may retry a call only if it fails without initial metadata.
        """
        self._sending_metadata = Operation(self._context.send_initial_metadata(((REQUEST_ID, self.request_id),)))

    async def send_initial_metadata(self) -> None:
        """Sends the initial metadata, and returns after they have been sent."""
        self.begin()
        await self._has_sent_metadata()

    async def write(self, message: Any) -> None:  # noqa: ANN401 - any method's answer
        """Sends a message, and returns when the caller has room for it."""
        if self._sending_metadata is not None:
            await self._has_sent_metadata()
        await self._context.write(message)

    async def abort(self, code: grpc.StatusCode, message: str, metadata: tuple[tuple[str, str | bytes], ...] = ()) -> None:
        """Ends the call with a status. Always raises an error.

        Raises:
            AbortError: The status has been sent.
            TimeoutError: The caller does not read. It gets the status when it reads.
        """
        async with asyncio.timeout(SEND_TIMEOUT):
            if self._sending_metadata is not None:
                # Until this ends, grpc does not know that the metadata are sent: a status would send them again, and get lost.
                await asyncio.wait((self._sending_metadata.end(),))
            # The trailing metadata have the request id too, because a refused call has no initial metadata.
            await Operation(self._context.abort(code, message, (*metadata, (REQUEST_ID, self.request_id)))).result

    def succeeded(self) -> None:
        """Notes that the method has answered the call."""
        if self.record is not None:
            self.record.code = grpc.StatusCode.OK

    def aborted(self) -> None:
        """Notes the status with which a method has ended the call by itself, if `failed` has not noted one."""
        if self.record is not None and self.record.code is None:
            self.record.code = self._context.code()

    def failed(self, status: CallStatus) -> None:
        """Notes the status with which the call ends."""
        if self.record is not None:
            self.record.code = status.code
            self.record.reason = status.reason
            self.record.retry_delay = status.retry_delay

    def undelivered(self) -> None:
        """Notes that the caller does not get the status, because gRPC had ended the call."""
        if self.record is not None:
            self.record.code = grpc.StatusCode.CANCELLED
            self.record.reason = ""
            self.record.retry_delay = None

    def logged(self) -> None:
        """Notes that the log says how the call ended."""
        if self.record is not None:
            self.record.is_logged = True

    def whereabouts(self) -> dict[str, str | float]:
        """Returns the log fields for how far the call has come, and where its time went; none if nobody observes calls."""
        return {} if self.record is None else {"phase": self.record.phase, **self.record.seconds()}

    def time_remaining(self) -> float | None:
        """Returns the seconds until the caller's deadline; None if there is none."""
        return self._context.time_remaining()

    async def _has_sent_metadata(self) -> None:
        if self._sending_metadata is not None:
            await self._sending_metadata.result
            self._sending_metadata = None
