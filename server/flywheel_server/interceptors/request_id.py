"""Gives each call a request id: the caller's `x-request-id`, or a new one."""

import asyncio
import re
import uuid
from contextvars import ContextVar
from typing import Final

import structlog

from flywheel_server.interceptors.base import Call, CallInterceptor, Context

KEY: Final = "x-request-id"
SENDING: Final = 1.0
"""Seconds that metadata or a status may take to be sent. A caller that reads nothing could hold the call for ever."""
_ACCEPTED: Final = re.compile(r"[\x21-\x7e]{1,128}")

request_id: ContextVar[str] = ContextVar("request_id")
"""The request id of the call that runs in this context."""


class RequestIdInterceptor(CallInterceptor):
    """Chooses the request id, and adds it to every line of the log that the call writes."""

    async def around(self, call: Call, context: Context) -> None:
        """Runs the call under its request id."""
        sent = next((value for key, value in context.invocation_metadata() or () if key == KEY), "")
        own = sent if isinstance(sent, str) and _ACCEPTED.fullmatch(sent) else uuid.uuid4().hex
        request_id.set(own)
        with structlog.contextvars.bound_contextvars(request_id=own):
            await call(context)


async def send_request_id(context: Context) -> None:
    """Sends the initial metadata, which hold the request id: the call has begun.

    Not before that: a call that is refused without any is one that gRPC's own retries, and those of proxies, may repeat.
    """
    sending = asyncio.ensure_future(context.send_initial_metadata(((KEY, request_id.get()),)))
    # Asyncio complains of an error that nobody looks at, and a call that is cancelled twice does not.
    sending.add_done_callback(lambda sent: sent.cancelled() or sent.exception())
    try:
        await asyncio.shield(sending)
    except asyncio.CancelledError:
        # Only when they are sent does grpc note it. A status before that would send them again, which fails, and get lost.
        await asyncio.wait({sending}, timeout=SENDING)
        sending.cancel()
        raise
