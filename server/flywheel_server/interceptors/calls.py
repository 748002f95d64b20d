"""What happens around every call, whichever method it is: one step after the other, each in a module of its own."""

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
    """Runs each call: its metadata, its caller, its request, its method, and the status that it ends with.

    To gRPC, all methods are of streams: such a call runs before its request has come. This server reads the request itself, and
    a caller who may not call so has nothing received from it. On the wire there is no difference.

    Arguments:
        max_metadata_bytes: The most metadata that a call may have.
        authentication: Finds out who calls.
        requests: Receives the requests of known callers.
        public: Runs the methods that anybody may call.
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
        """Returns the handler of the method, with what happens around each call. It is made once for each method."""
        method = handler_call_details.method
        if (known := self._handlers.get(method)) is not None:
            return known
        handler = await continuation(handler_call_details)
        if handler is None:
            # Nothing is kept: strangers may name any number of methods that there are not.
            return None  # type: ignore[return-value] # means that there is no such method
        make: Any = grpc.stream_stream_rpc_method_handler
        made: Handler = make(self._around(method, handler), None, handler.response_serializer)
        self._handlers[method] = made
        return made

    def _around(self, name: str, handler: Handler) -> Callable[[Any, GrpcContext], Awaitable[None]]:
        run = self._public.runner(handler) if is_public(name) else self._for_known_callers(Method(handler))

        async def call(_: object, context: GrpcContext) -> None:
            metadata = CallMetadata.of(context)
            call_context = CallContext(context, metadata.request_id)
            # Until the call has ended, which is a task of its own.
            structlog.contextvars.bind_contextvars(request_id=metadata.request_id)
            try:
                metadata.check_size(self._max_metadata_bytes)
                await run(context, metadata, call_context)
            except grpc.aio.AbortError:
                raise
            except Exception as error:  # noqa: BLE001 - every call ends with a status
                await end_with_status(call_context, error)

        return call

    def _for_known_callers(self, method: Method) -> Callable[[GrpcContext, CallMetadata, CallContext], Awaitable[None]]:
        async def run(context: GrpcContext, metadata: CallMetadata, call_context: CallContext) -> None:
            credentials = self._authentication.identify(context, metadata)
            # The request is in no variable here, because it may be large, and this frame lasts as long as the method runs.
            await method.answer(await self._requests.receive(method, context, credentials), call_context)

        return run
