"""Runs every call through the same steps. Each step is a module of this package."""

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import structlog

from flywheel_server.grpc_types import Continuation, GrpcContext, Handler, Metadata
from flywheel_server.interceptors.authentication import Authentication, Credentials
from flywheel_server.interceptors.context import CallContext
from flywheel_server.interceptors.errors import end_with_status
from flywheel_server.interceptors.metadata import CallMetadata
from flywheel_server.interceptors.methods import Method
from flywheel_server.interceptors.public import PublicMethods, is_public
from flywheel_server.operations import OperationWaiter
from flywheel_server.telemetry.calls import CallRecord, Calls


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Runs each call: checks its metadata, authenticates its caller, receives its request, runs its method, sets its status.

    For gRPC, all methods are stream_stream, because gRPC runs the handler of such a method before the request has arrived. So
    this server receives no request of a caller that is refused. On the wire there is no difference. For other methods, gRPC
    itself would receive and parse the request first. It would wait without a limit for the rest of a request, and would end a
    call with malformed bytes with INTERNAL and without details.

    Arguments:
        max_metadata_bytes: Maximum size of a call's metadata.
        max_message_bytes: Maximum size of a request after decompression, except for public methods.
        authentication: Authenticates callers.
        waits: Ends the wait for a request that does not arrive in time.
        public: Runs the methods that need no authentication.
        calls: Records the calls.
    """

    def __init__(
        self,
        max_metadata_bytes: int,
        max_message_bytes: int,
        authentication: Authentication,
        waits: OperationWaiter,
        public: PublicMethods,
        *,
        calls: Calls,
    ) -> None:
        self._max_metadata_bytes = max_metadata_bytes
        self._max_message_bytes = max_message_bytes
        self._authentication = authentication
        self._waits = waits
        self._public = public
        self._calls = calls
        self._handlers: dict[str, Handler] = {}

    async def intercept_service(self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails) -> Handler:
        """Returns the handler that runs the method's calls. It is made once for each method."""
        method = handler_call_details.method
        if (known := self._handlers.get(method)) is not None:
            return known
        handler = await continuation(handler_call_details)
        if handler is None:
            entries: Metadata = tuple(handler_call_details.invocation_metadata or ())
            self._calls.unknown_method(CallMetadata.of(entries).request_id, entries)
            # Not cached: strangers could fill the memory with names of methods that do not exist.
            return None  # type: ignore[return-value] # means that there is no such method
        make: Any = grpc.stream_stream_rpc_method_handler
        made: Handler = make(self._handle(method, handler), None, handler.response_serializer)
        self._handlers[method] = made
        return made

    def _handle(self, name: str, handler: Handler) -> Callable[[Any, GrpcContext], Awaitable[None]]:
        run = self._public.runner(handler) if is_public(name) else self._authenticated(handler)
        method = name.removeprefix("/")

        async def call(_: object, context: GrpcContext) -> None:
            metadata, record = self._begin(method, context)
            call_context = CallContext(context, metadata.request_id, record)
            # For all log lines of this call, whose task has a context of its own.
            structlog.contextvars.bind_contextvars(request_id=metadata.request_id)
            try:
                metadata.check_size(self._max_metadata_bytes)
                await run(context, metadata, call_context)
                call_context.succeeded()
            except grpc.aio.AbortError:
                call_context.aborted()
                raise
            except Exception as error:  # noqa: BLE001 - every call ends with a status
                await end_with_status(call_context, error)
            finally:
                if record is not None:
                    self._calls.end(record)

        return call

    def _begin(self, method: str, context: GrpcContext) -> tuple[CallMetadata, CallRecord | None]:
        # The rest of the metadata is not kept for as long as the call runs.
        entries: Metadata = tuple(context.invocation_metadata() or ())
        metadata = CallMetadata.of(entries)
        return metadata, self._calls.begin(method, metadata.request_id, context, entries)

    def _authenticated(self, handler: Handler) -> Callable[[GrpcContext, CallMetadata, CallContext], Awaitable[None]]:
        method = Method(handler, self._max_message_bytes, self._waits)

        async def run(context: GrpcContext, metadata: CallMetadata, call_context: CallContext) -> None:
            credentials = self._authentication.identify(context, metadata)
            # No variable holds the request here: it may be large, and would stay in memory while the method runs.
            await method.answer(await self._receive(method, context, credentials), call_context)

        return run

    async def _receive(self, method: Method, context: GrpcContext, credentials: Credentials) -> Any:  # noqa: ANN401 - any method's request
        request = await method.receive(context)
        # Again, immediately before the method starts: the key may have been revoked while the request arrived.
        self._authentication.confirm(credentials)
        return request
