"""What a method sees of its call."""

import asyncio
from typing import Any, Final

import grpc
import grpc.aio

from flywheel_server.grpc_types import GrpcContext
from flywheel_server.operations import Operation

REQUEST_ID: Final = "x-request-id"

SEND_TIMEOUT: Final = 1.0
"""Seconds that metadata or a status may take to be sent. A caller that reads nothing could hold the call for ever."""


class CallContext:
    """The means to answer a call: initial metadata when the work begins, messages, and a status if the call fails.

    Attributes:
        request_id: The request id of the call.
    """

    def __init__(self, context: GrpcContext, request_id: str) -> None:
        self.request_id = request_id
        self._context = context
        self._sending_metadata: Operation[None] | None = None

    def begin(self) -> None:
        """Sends the initial metadata, which hold the request id: the work has begun. Does not wait for them to be sent.

        Not before that: a call that is refused without any is one that gRPC's own retries, and those of proxies, may repeat.
        """
        self._sending_metadata = Operation(self._context.send_initial_metadata(((REQUEST_ID, self.request_id),)))

    async def send_initial_metadata(self) -> None:
        """Sends the initial metadata, and returns when they have been sent."""
        self.begin()
        await self._has_sent_metadata()

    async def write(self, message: Any) -> None:  # noqa: ANN401 - any method's answer
        """Sends a message, and returns when the caller has room for it."""
        if self._sending_metadata is not None:
            await self._has_sent_metadata()
        await self._context.write(message)

    async def abort(self, code: grpc.StatusCode, message: str, metadata: tuple[tuple[str, str | bytes], ...] = ()) -> None:
        """Ends the call with a status; always raises.

        Raises:
            AbortError: The status has been sent.
            TimeoutError: The caller reads nothing, and gets the status when it does.
        """
        async with asyncio.timeout(SEND_TIMEOUT):
            if self._sending_metadata is not None:
                # grpc notes only then that they are sent. A status before that would send them again, and get lost.
                await asyncio.wait((self._sending_metadata.end(),))
            # Here too: a call that is refused before it begins has no initial metadata.
            await Operation(self._context.abort(code, message, (*metadata, (REQUEST_ID, self.request_id)))).result

    def time_remaining(self) -> float | None:
        """Returns the seconds until the caller's deadline; None if there is none."""
        return self._context.time_remaining()

    async def _has_sent_metadata(self) -> None:
        if self._sending_metadata is not None:
            await self._sending_metadata.result
            self._sending_metadata = None
