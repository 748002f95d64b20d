"""The shape of this server's interceptors: code around a call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias

import grpc
import grpc.aio

Context = grpc.aio.ServicerContext[Any, Any]
Call = Callable[[Context], Awaitable[None]]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # not subscriptable at run time
Continuation: TypeAlias = "Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]]"


class CallInterceptor(grpc.aio.ServerInterceptor, ABC):
    """Runs `around` each call of a method that the interceptor covers.

    To gRPC, all methods are of streams: such a call runs before its request has come. The innermost interceptor reads the
    request, and a caller who may not call so has nothing received from it. On the wire there is no difference.
    """

    def covers(self, method: str) -> bool:  # noqa: ARG002 - the default
        """Returns whether calls of the method, such as `/package.Service/Method`, run within this interceptor."""
        return True

    @abstractmethod
    async def around(self, call: Call, context: Context) -> None:
        """Runs the call by awaiting `call(context)`."""

    def inner(self, handler: Handler) -> Call:
        """Returns the call that `around` gets: that of the next interceptor."""
        run: Any = handler.stream_stream

        async def call(context: Context) -> None:
            await run(None, context)

        return call

    async def intercept_service(self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails) -> Handler:
        """Returns the handler of the method with `around` around it."""
        handler = await continuation(handler_call_details)
        if handler is None or not self.covers(handler_call_details.method):
            return handler  # type: ignore[return-value] # None means that there is no such method
        call = self.inner(handler)

        async def wrapped(_: AsyncIterator[bytes], context: Context) -> None:
            await self.around(call, context)

        make: Any = grpc.stream_stream_rpc_method_handler
        rewrapped: Handler = make(wrapped, None, handler.response_serializer)
        return rewrapped
