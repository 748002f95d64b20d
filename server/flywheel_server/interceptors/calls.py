"""Runs every call through the same steps. Each step is a module of this package."""

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import structlog

from flywheel_server.grpc_types import Continuation, GrpcContext, Handler
from flywheel_server.interceptors.authentication import Authentication
from flywheel_server.interceptors.context import CallContext
from flywheel_server.interceptors.errors import end_with_status
from flywheel_server.interceptors.metadata import CallMetadata
from flywheel_server.interceptors.methods import Method
from flywheel_server.interceptors.public import PublicMethods, is_public
from flywheel_server.interceptors.reading import RequestReader


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Runs each call: checks its metadata, authenticates its caller, receives its request, runs its method, sets its status.

    For gRPC, all methods are stream_stream, because gRPC runs the handler of such a method before the request has arrived. So
    this server receives no request of a caller that is refused. On the wire there is no difference.

    Arguments:
        max_metadata_bytes: Maximum size of a call's metadata.
        authentication: Authenticates callers.
        requests: Receives the requests of authenticated callers.
        public: Runs the methods that need no authentication.
    """

    def __init__(
        self, max_metadata_bytes: int, authentication: Authentication, requests: RequestReader, public: PublicMethods
    ) -> None:
        self._max_metadata_bytes = max_metadata_bytes
        self._authentication = authentication
        self._requests = requests
        self._public = public
        self._handlers: dict[str, Handler] = {}

    async def intercept_service(self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails) -> Handler:
        """Returns the handler that runs the method's calls. It is made once for each method."""
        method = handler_call_details.method
        if (known := self._handlers.get(method)) is not None:
            return known
        handler = await continuation(handler_call_details)
        if handler is None:
            # Not cached: strangers could fill the memory with names of methods that do not exist.
            return None  # type: ignore[return-value] # means that there is no such method
        make: Any = grpc.stream_stream_rpc_method_handler
        made: Handler = make(self._handle(method, handler), None, handler.response_serializer)
        self._handlers[method] = made
        return made

    def _handle(self, name: str, handler: Handler) -> Callable[[Any, GrpcContext], Awaitable[None]]:
        run = self._public.runner(handler) if is_public(name) else self._authenticated(Method(handler))

        async def call(_: object, context: GrpcContext) -> None:
            metadata = CallMetadata.of(context)
            call_context = CallContext(context, metadata.request_id)
            # For all log lines of this call, whose task has a context of its own.
            structlog.contextvars.bind_contextvars(request_id=metadata.request_id)
            try:
                metadata.check_size(self._max_metadata_bytes)
                await run(context, metadata, call_context)
            except grpc.aio.AbortError:
                raise
            except Exception as error:  # noqa: BLE001 - every call ends with a status
                await end_with_status(call_context, error)

        return call

    def _authenticated(self, method: Method) -> Callable[[GrpcContext, CallMetadata, CallContext], Awaitable[None]]:
        async def run(context: GrpcContext, metadata: CallMetadata, call_context: CallContext) -> None:
            credentials = self._authentication.identify(context, metadata)
            # No variable holds the request here: it may be large, and would stay in memory while the method runs.
            await method.answer(await self._requests.receive(method, context, credentials), call_context)

        return run
