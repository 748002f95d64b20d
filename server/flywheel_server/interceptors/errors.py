"""Ends a failed call with the status that the table in `flywheel_server.errors` has for its error."""

import asyncio
import traceback
from collections.abc import Mapping

import grpc
import grpc.aio
import structlog

from flywheel_server.engines.base import EngineError
from flywheel_server.errors import CallStatus, DeadlineExceededError, QuotaExceededError, UnauthenticatedError, status_of
from flywheel_server.interceptors.context import CallContext
from flywheel_server.interceptors.methods import MethodError
from flywheel_server.system.shortage import shortage_in

log = structlog.stdlib.get_logger(__name__)


def _cause(error: Exception) -> dict[str, str]:
    """Returns the log fields for the cause of an error. They never contain the text of a prompt."""
    if shortage := shortage_in(error):
        return {"cause": str(shortage) or type(shortage).__name__}
    match error:
        case EngineError() | MethodError():
            return {"cause": str(error)}
        case UnauthenticatedError() | DeadlineExceededError():
            return {"cause": error.reason}
        case QuotaExceededError():
            return {"cause": error.quota}
        case _:
            return {}


def _clear_frames(error: BaseException) -> None:
    """Clears the local variables of the frames in the tracebacks of an error and of its causes.

    One of these variables is the request. It would stay in memory until the next garbage collection, so that strangers could
    fill the memory.
    """
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__


async def end_with_status(context: CallContext, error: Exception) -> None:
    """Ends the call with the status of the error, and logs the error. Always raises `AbortError` or `CancelledError`.

    If gRPC has already ended the call, because the caller is gone or gRPC refused a message, the call has another status, and
    the error is often only a consequence. So the error is logged only if the caller gets its status, or if the server failed.
    """
    status = status_of(error, context.request_id)
    # gRPC raises such an error if the caller has gone, which is a cancellation.
    is_of_grpc = isinstance(error, grpc.aio.InternalError)
    if not is_of_grpc:
        context.failed(status)
    _clear_frames(error)
    is_own_fault = status.code is grpc.StatusCode.INTERNAL and not is_of_grpc
    is_sent = True
    try:
        await context.abort(status.code, status.message, status.trailing_metadata())
    except grpc.aio.AbortError:
        raise
    except TimeoutError as unread:
        raise asyncio.CancelledError from unread
    except Exception as unsent:
        # The call has ended already. grpc would log its own error as a fault of the server.
        is_sent = False
        log.debug("status not sent", error=type(unsent).__name__)
        raise asyncio.CancelledError from unsent
    finally:
        if is_sent or is_own_fault:
            _log(error, status, context.whereabouts())
            context.logged()
        else:
            context.undelivered()


def _log(error: Exception, status: CallStatus, whereabouts: Mapping[str, str | float]) -> None:
    if status.code is grpc.StatusCode.INTERNAL:
        log.error("call failed", exc_info=error, **_cause(error), **whereabouts)
    else:
        log.info("call refused", code=status.code.name, error=type(error).__name__, **_cause(error), **whereabouts)
