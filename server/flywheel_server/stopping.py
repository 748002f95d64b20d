"""Ends the connections of the server when it stops."""

import asyncio
from typing import Final

import grpc.aio

DRAIN_GRACE: Final = 1e6
"""Seconds of grace for calls while the server drains. It is unlimited in effect: `end` stops the server again, with less."""

STATUS_GRACE: Final = 0.5
"""Seconds that calls have to send their last messages and statuses after all generations have ended."""

CLOSE_TIMEOUT: Final = 3.0
"""Seconds after which the server no longer waits for its connections to close."""


class Connections:
    """The connections of a gRPC server. They end in two steps: `drain`, then `end`."""

    def __init__(self, server: grpc.aio.Server) -> None:
        self._server = server
        self._stops: list[asyncio.Task[None]] = []

    def drain(self) -> None:
        """Closes the port and sends GOAWAY to every client, so that each connection closes after its last call.

        gRPC ends some calls with CANCELLED and without details: calls that it has received but not handed over yet, and calls
        that arrive before their client has seen the GOAWAY (grpc#41785).
        """
        self._stop(DRAIN_GRACE)

    async def end(self) -> None:
        """Ends all connections, and returns when they have closed, at most `CLOSE_TIMEOUT` seconds later."""
        self._stop(STATUS_GRACE)
        # A peer that does not read would keep its connection open, and so the server, until keepalive gives it up.
        await asyncio.wait(self._stops, timeout=CLOSE_TIMEOUT)

    def _stop(self, grace: float) -> None:
        self._stops.append(asyncio.create_task(self._server.stop(grace)))
