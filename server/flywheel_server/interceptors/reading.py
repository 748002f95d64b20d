"""Reads the request of a call and makes a message of it: after authentication, in bounded time, and with errors of ours.

grpc itself would receive and parse it before any interceptor runs, be the caller known or not, would wait for the rest of it
for ever, and would end a call whose bytes are no message with INTERNAL and without details.
"""

import asyncio
from typing import Any, Final

import grpc.aio

from flywheel_server.errors import IncompleteRequestError, MalformedRequestError
from flywheel_server.interceptors.base import Call, CallInterceptor, Context, Handler

REQUEST_TIMEOUT: Final = 30.0
"""Seconds in which a request must have arrived."""


class ReadingInterceptor(CallInterceptor):
    """The last of the interceptors: the method that it calls gets the message, and writes its own."""

    async def around(self, call: Call, context: Context) -> None:
        """Runs the call."""
        await call(context)

    def inner(self, handler: Handler) -> Call:
        """Returns the method, which gets the message. Raises `IncompleteRequestError` and `MalformedRequestError`."""
        method: Any = handler.unary_stream if handler.response_streaming else handler.unary_unary
        parse: Any = handler.request_deserializer

        async def call(context: Context) -> None:
            # Held by nobody but the method: it may be large.
            await method(_parsed(parse, await _read(context)), context)

        return call


def _parsed(parse: Any, data: bytes) -> Any:  # noqa: ANN401 - any method's request
    try:
        return parse(data)
    except Exception as error:  # protobuf's implementations raise what they like; none may reach the caller
        raise MalformedRequestError from error


async def _read(context: Context) -> bytes:
    try:
        async with asyncio.timeout(REQUEST_TIMEOUT):
            data: Any = await context.read()
    except TimeoutError as error:
        raise IncompleteRequestError from error
    if data is grpc.aio.EOF:
        raise MalformedRequestError
    return bytes(data)
