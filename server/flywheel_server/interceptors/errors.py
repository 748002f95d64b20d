"""Ends each call with a status that its caller can act on: whatever goes wrong, by the table in `flywheel_server.errors`."""

from typing import Any

import grpc
import grpc.aio
import structlog

from flywheel_server.engines.base import EngineError
from flywheel_server.errors import MalformedRequestError, status_of
from flywheel_server.interceptors.base import Call, CallInterceptor, Context, Deserializer
from flywheel_server.interceptors.request_id import request_id

log = structlog.stdlib.get_logger(__name__)


class ErrorInterceptor(CallInterceptor):
    """Turns exceptions into statuses, and logs the cause of those that are the server's own fault."""

    def deserializer(self, deserialize: Deserializer) -> Deserializer:
        """Returns a deserializer that returns its error: grpc answers one that is raised with INTERNAL, without details."""

        def lenient(data: bytes) -> Any:  # noqa: ANN401 - any method's request
            try:
                return deserialize(data)
            except Exception:  # noqa: BLE001 - protobuf's implementations raise what they like; none may reach the caller
                return MalformedRequestError()

        return lenient

    async def around(self, call: Call, request: Any, context: Context) -> Any:  # noqa: ANN401 - any method's messages
        """Runs the call; an exception ends it with its status."""
        try:
            if isinstance(request, MalformedRequestError):
                raise request
            return await call(request, context)
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            status = status_of(error, request_id.get())
            if status.code is grpc.StatusCode.INTERNAL:
                log.exception("call failed")
            else:
                cause = {"cause": str(error)} if isinstance(error, EngineError) else {}
                log.info("call refused", code=status.code.name, error=type(error).__name__, **cause)
            await context.abort(status.code, status.message, status.trailing_metadata())
