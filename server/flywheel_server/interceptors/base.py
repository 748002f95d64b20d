"""The shape of this server's interceptors: code around a call of the generation service."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import grpc
import grpc.aio
from flywheel_proto.v1 import generation_pb2

Context = grpc.aio.ServicerContext[Any, Any]
Call = Callable[[Any, Context], Awaitable[Any]]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # not subscriptable at run time
Continuation: TypeAlias = "Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]]"

_SERVICE = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name


class CallInterceptor(grpc.aio.ServerInterceptor, ABC):
    """Runs `around` each call of the generation service; health and reflection pass untouched.

    The calls are coroutines, as the methods of our servicer are: unary ones return their response, streaming ones write to
    the context. A request is bytes until the last interceptor, which parses it.
    """

    @abstractmethod
    async def around(self, call: Call, request: bytes, context: Context) -> Any:  # noqa: ANN401 - any method's response
        """Runs the call by awaiting `call(request, context)`, and returns what that returns."""

    def inner(self, handler: Handler) -> Call:
        """Returns the call that `around` gets: that of the handler."""
        call: Any = handler.unary_stream if handler.response_streaming else handler.unary_unary
        return call  # type: ignore[no-any-return] # grpc's types know only generators

    async def intercept_service(self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails) -> Handler:
        """Returns the handler of the method with `around` around it."""
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(f"/{_SERVICE}/"):
            return handler  # type: ignore[return-value] # None means that there is no such method
        call = self.inner(handler)

        async def wrapped(request: bytes, context: Context) -> Any:  # noqa: ANN401 - any method's response
            return await self.around(call, request, context)

        make: Any = grpc.unary_stream_rpc_method_handler if handler.response_streaming else grpc.unary_unary_rpc_method_handler
        rewrapped: Handler = make(wrapped, None, handler.response_serializer)
        return rewrapped
