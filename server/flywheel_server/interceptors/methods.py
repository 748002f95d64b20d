"""Receives the requests of a call, and runs the method of the servicer on them."""

from collections.abc import Awaitable, Callable
from types import CoroutineType
from typing import Any

import grpc.aio

from flywheel_server.compression import decompressed
from flywheel_server.errors import MalformedRequestError
from flywheel_server.grpc_types import GrpcContext, Handler
from flywheel_server.operations import Operation, OperationWaiter


class MethodError(TypeError):
    """A method of a servicer does not work as this server's methods do."""


class Method:
    """A method of a servicer: it gets a message, writes its answers to the context, and returns nothing.

    A method with a stream of requests gets them one by one.
    """

    def __init__(self, handler: Handler) -> None:
        self._function: Callable[[Any, Any], Any] = next(
            filter(None, (handler.unary_unary, handler.unary_stream, handler.stream_unary, handler.stream_stream))
        )
        self._parse: Any = handler.request_deserializer

    async def receive(self, context: GrpcContext, limit: int, waits: OperationWaiter) -> Any:  # noqa: ANN401 - any method's request
        """Returns the next request; None after the last one. Waits for it as one of `waits`, and raises what these raise.

        Raises:
            RequestTooLargeError: It has more than `limit` bytes after decompression.
            MalformedRequestError: It is not a message of its type.
        """
        data: Any = await waits.wait(Operation(context.read()))
        if data is grpc.aio.EOF:
            return None
        message = await decompressed(data, limit)
        try:
            return self._parse(message)
        except Exception as error:  # protobuf's implementations raise what they like; none may reach the caller
            raise MalformedRequestError from error

    def answer(self, request: Any, context: Any) -> Awaitable[None]:  # noqa: ANN401 - any method's request
        """Runs the method. Raises `MethodError` if the method returns or yields its answers instead of writing them."""
        # Not a coroutine: its frame would hold the request, which may be large, for as long as the method runs.
        return self._checked(self._function(request, context))

    async def _checked(self, running: Any) -> None:  # noqa: ANN401 - whatever a method may return
        is_coroutine = isinstance(running, CoroutineType)
        returned = await running if is_coroutine else running
        if returned is not None or not is_coroutine:
            name = getattr(self._function, "__qualname__", repr(self._function))
            raise MethodError(
                f"{name} returned or yielded an answer ({type(returned).__name__}), which nobody sends. Make it `async def`, "
                "write each answer with `await context.write(answer)`, and return nothing."
            )
