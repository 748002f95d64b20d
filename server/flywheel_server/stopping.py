"""How the server takes leave of the connections of its callers."""

import asyncio
from typing import Final

import grpc.aio

UNTIL_CUT_SHORT: Final = 1e6
"""Seconds of grace for calls, more than any stop takes: a second stop with less cuts them short."""

LAST_WORDS: Final = 0.5
"""Seconds between the end of the last generation and that of the connections."""

CLOSING: Final = 3.0
"""Seconds in which the connections must have ended."""


class Connections:
    """The connections of a server of gRPC, which end in two steps."""

    def __init__(self, server: grpc.aio.Server) -> None:
        self._server = server
        self._stops: list[asyncio.Task[None]] = []

    def drain(self) -> None:
        """Closes the port and sends GOAWAY to every client: each connection ends with its last call.

        A call that gRPC has received by now and that no code has seen yet, or that arrives before its client has seen the
        GOAWAY, is ended by gRPC with CANCELLED and without details (grpc#41785).
        """
        self._stop(UNTIL_CUT_SHORT)

    async def end(self) -> None:
        """Returns when all have ended. Calls that still run have some time for their last messages and statuses."""
        self._stop(LAST_WORDS)
        # A peer that takes nothing from its socket would hold its connection, and the server, until a ping has no answer.
        await asyncio.wait(self._stops, timeout=CLOSING)

    def _stop(self, grace: float) -> None:
        self._stops.append(asyncio.create_task(self._server.stop(grace)))
