"""Receives the requests of a call, and passes them to the servicer's method."""

from collections.abc import Awaitable, Callable
from types import CoroutineType
from typing import Any, Final

import grpc.aio

from flywheel_server.compression import decompressed
from flywheel_server.errors import MalformedRequestError
from flywheel_server.grpc_types import GrpcContext, Handler
from flywheel_server.operations import Operation, OperationWaiter

REQUEST_TIMEOUT: Final = 30.0
"""Seconds of running time within which a request must arrive."""


class MethodError(TypeError):
    """A servicer's method returns or yields its answers instead of writing them to the context."""


class Method:
    """A servicer's method, which gets a message, writes its answers to the context, and returns nothing.

    A method with a stream of requests is called once for each request.

    Arguments:
        handler: The method, as registered with gRPC.
        max_request_bytes: Maximum size of a request, after decompression.
        waits: Ends the wait for a request that does not arrive in time.
    """

    def __init__(self, handler: Handler, max_request_bytes: int, waits: OperationWaiter) -> None:
        self._function: Callable[[Any, Any], Any] = next(
            filter(None, (handler.unary_unary, handler.unary_stream, handler.stream_unary, handler.stream_stream))
        )
        self._parse: Any = handler.request_deserializer
        self._max_request_bytes = max_request_bytes
        self._waits = waits

    async def receive(self, context: GrpcContext) -> Any:  # noqa: ANN401 - any method's request
        """Returns the request of a call that must have one.

        Raises:
            IncompleteRequestError: The request has not arrived in time.
            RequestTooLargeError: The request is too large.
            MalformedRequestError: There is no request, or it is not a message of the method's type.
            EngineUnavailableError: The server stops.
        """
        request = await self.receive_next(context)
        if request is None:
            raise MalformedRequestError
        return request

    async def receive_next(self, context: GrpcContext) -> Any:  # noqa: ANN401 - any method's request
        """Returns the next request, or None after the last one. Raises the errors of `receive`."""
        data: Any = await self._waits.wait(Operation(context.read()))
        if data is grpc.aio.EOF:
            return None
        message = await decompressed(data, self._max_request_bytes)
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
