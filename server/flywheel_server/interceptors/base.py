"""The shape of this server's interceptors: code around a call of the generation service."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias

import grpc
import grpc.aio
from flywheel_proto.v1 import generation_pb2

Context = grpc.aio.ServicerContext[Any, Any]
Call = Callable[[Context], Awaitable[None]]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # not subscriptable at run time
Continuation: TypeAlias = "Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]]"

_SERVICE = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name


class CallInterceptor(grpc.aio.ServerInterceptor, ABC):
    """Runs `around` each call of the generation service; health and reflection pass untouched.

    To gRPC, all methods are of streams: such a call runs before its request has come, which `ReadingInterceptor`, the last,
    reads. A caller who may not call so has nothing received from it. On the wire there is no difference.
    """

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
        if handler is None or not handler_call_details.method.startswith(f"/{_SERVICE}/"):
            return handler  # type: ignore[return-value] # None means that there is no such method
        call = self.inner(handler)

        async def wrapped(_: AsyncIterator[bytes], context: Context) -> None:
            await self.around(call, context)

        make: Any = grpc.stream_stream_rpc_method_handler
        rewrapped: Handler = make(wrapped, None, handler.response_serializer)
        return rewrapped
