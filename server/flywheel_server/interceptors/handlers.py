"""Keeps what the other interceptors make of each method."""

import grpc
import grpc.aio

from flywheel_server.interceptors.base import Continuation, Handler


class HandlerInterceptor(grpc.aio.ServerInterceptor):
    """Has the inner interceptors wrap the handler of a method once, rather than for each call."""

    def __init__(self) -> None:
        self._handlers: dict[str, Handler] = {}

    async def intercept_service(self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails) -> Handler:
        """Returns the wrapped handler of the method."""
        method = handler_call_details.method
        if method in self._handlers:
            return self._handlers[method]
        handler = await continuation(handler_call_details)
        if handler is None:
            # Strangers may name any number of methods that there are not.
            return None  # type: ignore[return-value] # means that there is no such method
        self._handlers[method] = handler
        return handler
