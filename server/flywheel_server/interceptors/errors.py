"""Ends calls with a status that their callers can act on: whatever goes wrong, by the table in `flywheel_server.errors`."""

import asyncio
import traceback

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
    """Returns what the log may say of an error: nothing that has the text of a prompt."""
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
    """Lets go of the local variables of the frames that raised an error, and those that led to it.

    One of them is the request. It would otherwise be kept until the next garbage collection: strangers could fill the memory.
    """
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__


async def end_with_status(context: CallContext, error: Exception) -> None:
    """Ends the call with the status of the error, and logs it; raises what ends the handler of a call that has its status.

    The log follows the status: a call that gRPC has ended meanwhile, because its caller is gone or its message is refused, has
    another status, and often it is only this end that the error comes from. A fault of the server's own is logged in any case.
    """
    status = status_of(error, context.request_id)
    _clear_frames(error)
    is_own_fault = status.code is grpc.StatusCode.INTERNAL and not isinstance(error, grpc.aio.InternalError)
    is_sent = True
    try:
        await context.abort(status.code, status.message, status.trailing_metadata())
    except grpc.aio.AbortError:
        raise
    except TimeoutError as unread:
        # The caller reads nothing, and gets the status when it does.
        raise asyncio.CancelledError from unread
    except Exception as unsent:
        # What grpc raises if the call has ended, it would log as if it were a fault of ours.
        is_sent = False
        log.debug("status not sent", error=type(unsent).__name__)
        raise asyncio.CancelledError from unsent
    finally:
        if is_sent or is_own_fault:
            _log(error, status)


def _log(error: Exception, status: CallStatus) -> None:
    if status.code is grpc.StatusCode.INTERNAL:
        log.error("call failed", exc_info=error, **_cause(error))
    else:
        log.info("call refused", code=status.code.name, error=type(error).__name__, **_cause(error))
