"""Runs the methods that need no authentication, within small limits."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

import grpc.aio
from grpc_health.v1 import health

from flywheel_server.errors import IncompleteRequestError, ServerFullError
from flywheel_server.grpc_types import GrpcContext, Handler
from flywheel_server.interceptors.context import CallContext
from flywheel_server.interceptors.metadata import CallMetadata
from flywheel_server.interceptors.methods import Method
from flywheel_server.operations import Operation, OperationWaiter
from flywheel_server.public_limits import (
    MAX_REQUEST_BYTES,
    MAX_SHORT_CALLS,
    MAX_UNREAD_ANSWERS,
    RETRY_DELAY,
    CallLimit,
    FairSlots,
)
from flywheel_server.reflection import V1, V1ALPHA

PUBLIC_SERVICES: Final = frozenset({health.SERVICE_NAME, V1, V1ALPHA})
"""The services that need no authentication. All other services need it."""


def is_public(method: str) -> bool:
    """Returns whether a method, such as `/package.Service/Method`, needs no authentication."""
    return method.removeprefix("/").partition("/")[0] in PUBLIC_SERVICES


class PublicMethods:
    """Runs the calls of public methods.

    A unary call holds one of the slots of `public_limits` while its request is received and answered. In a stream of requests,
    each request holds a slot of its own. A method that streams answers to one request holds a slot only until the request has
    arrived; after that, the call counts against `max_streams`.

    Arguments:
        max_streams: Maximum number of calls that stream answers at a time.
        waits: Ends the wait for a request that does not arrive in time.
    """

    def __init__(self, max_streams: int, waits: OperationWaiter) -> None:
        self._waits = waits
        self._short_calls = CallLimit(MAX_SHORT_CALLS)
        self._slots = FairSlots()
        self._streams = CallLimit(max_streams)
        self._unread: Counter[str] = Counter()

    def runner(self, handler: Handler) -> Callable[[GrpcContext, CallMetadata, CallContext], Awaitable[None]]:
        """Returns the function that runs calls of the method."""
        method = Method(handler, MAX_REQUEST_BYTES, self._waits)
        if handler.request_streaming:
            return lambda context, *_: self._answer_each(method, context)
        if handler.response_streaming:
            return lambda context, *_: self._stream(method, context)
        return lambda context, *_: self._answer(method, context)

    @asynccontextmanager
    async def _slot(self, context: GrpcContext) -> AsyncIterator[None]:
        """Waits for a slot, and holds it for the length of the context. Raises `ServerFullError` if no slot becomes free."""
        connection = context.peer()
        async with self._short_calls.call(connection), self._slots.slot(connection):
            if self._unread[connection] >= MAX_UNREAD_ANSWERS:
                raise ServerFullError(RETRY_DELAY)
            yield

    async def _answer(self, method: Method, context: GrpcContext) -> None:
        async with self._slot(context):
            await method.answer(await method.receive(context), _PublicCall(context, self._unread))

    async def _answer_each(self, method: Method, context: GrpcContext) -> None:
        await self._answer(method, context)
        while True:
            arrived = False
            try:
                async with self._slot(context):
                    request = await method.receive_next(context)
                    if request is None:
                        return
                    arrived = True
                    await method.answer(request, _PublicCall(context, self._unread))
            except (IncompleteRequestError, ServerFullError):
                if arrived:
                    raise
                return  # every request that arrived has its answer

    async def _stream(self, method: Method, context: GrpcContext) -> None:
        async with self._slot(context):
            request = await method.receive(context)
        async with self._streams.call(context.peer()):
            await method.answer(request, _PublicCall(context, self._unread))


class _PublicCall:
    """The context that a public method gets. Counts, for each connection, the answers that the caller does not read."""

    def __init__(self, context: GrpcContext, unread: Counter[str]) -> None:
        self._context = context
        self._unread = unread
        self.abort = context.abort

    async def write(self, message: Any) -> None:  # noqa: ANN401 - any method's answer
        """Sends a message, and returns when the caller has room for it."""
        writing = Operation(self._context.write(message))
        try:
            await writing.result
        except grpc.aio.InternalError as error:
            # The caller has just gone. grpc would log its own error as a fault of the server.
            raise asyncio.CancelledError from error
        finally:
            if not writing.is_over:
                self._count_unread(writing, self._context.peer())

    def _count_unread(self, writing: Operation[None], connection: str) -> None:
        def on_end(_: object) -> None:
            self._unread[connection] -= 1
            if not self._unread[connection]:
                del self._unread[connection]

        self._unread[connection] += 1
        writing.end().add_done_callback(on_end)
