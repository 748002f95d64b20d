"""Receives the requests of a call, and passes them to the servicer's method."""

from collections.abc import Awaitable, Callable
from types import CoroutineType
from typing import Any

import grpc.aio

from flywheel_server.compression import decompressed
from flywheel_server.errors import MalformedRequestError
from flywheel_server.grpc_types import GrpcContext, Handler
from flywheel_server.operations import Operation, OperationWaiter


class MethodError(TypeError):
    """A servicer's method returns or yields its answers instead of writing them to the context."""


class Method:
    """A servicer's method, which gets a message, writes its answers to the context, and returns nothing.

    A method with a stream of requests is called once for each request.
    """

    def __init__(self, handler: Handler) -> None:
        self._function: Callable[[Any, Any], Any] = next(
            filter(None, (handler.unary_unary, handler.unary_stream, handler.stream_unary, handler.stream_stream))
        )
        self._parse: Any = handler.request_deserializer

    async def receive(self, context: GrpcContext, limit: int, waits: OperationWaiter) -> Any:  # noqa: ANN401 - any method's request
        """Returns the next request, or None after the last one. Waits as long as `waits` allows, and raises its errors.

        Raises:
            RequestTooLargeError: The request has more than `limit` bytes after decompression.
            MalformedRequestError: The request is not a message of the method's type.
        """
        data: Any = await waits.wait(Operation(context.read()))
        if data is grpc.aio.EOF:
            return None
        message = await decompressed(data, limit)
        try:
            return self._parse(message)
        except Exception as error:  # protobuf's implementations raise different errors
            raise MalformedRequestError from error

    def answer(self, request: Any, context: Any) -> Awaitable[None]:  # noqa: ANN401 - any method's request
        """Runs the method. Raises `MethodError` if the method returns or yields its answers instead of writing them."""
        # Not `async def`: the frame would keep the request, which may be large, in memory while the method runs.
        return self._checked(self._function(request, context))

    async def _checked(self, running: Any) -> None:  # noqa: ANN401 - whatever a method may return
        is_coroutine = isinstance(running, CoroutineType)
        returned = await running if is_coroutine else running
        if returned is not None or not is_coroutine:
            name = getattr(self._function, "__qualname__", repr(self._function))
            raise MethodError(
                f"{name} returned or yielded an answer ({type(returned).__name__}), which is not sent. Make it `async def`, "
                "write each answer with `await context.write(answer)`, and return nothing."
            )
