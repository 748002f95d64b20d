"""Makes a message of the bytes of a request within the call: after authentication, and with an error of ours.

grpc itself would do so before any interceptor runs, be the caller known or not, and would end a call whose bytes are no message
with INTERNAL and without details.
"""

from typing import Any

from flywheel_server.errors import MalformedRequestError
from flywheel_server.interceptors.base import Call, CallInterceptor, Context, Handler


class ParsingInterceptor(CallInterceptor):
    """The last of the interceptors: the method that it calls gets the message."""

    async def around(self, call: Call, request: bytes, context: Context) -> Any:  # noqa: ANN401 - any method's response
        """Runs the call."""
        return await call(request, context)

    def inner(self, handler: Handler) -> Call:
        """Returns the call of the handler, which raises `MalformedRequestError` for bytes that are no message of its type."""
        call = super().inner(handler)
        parse: Any = handler.request_deserializer

        async def parsed(data: bytes, context: Context) -> Any:  # noqa: ANN401 - any method's response
            try:
                message = parse(data)
            except Exception as error:  # protobuf's implementations raise what they like; none may reach the caller
                raise MalformedRequestError from error
            return await call(message, context)

        return parsed
