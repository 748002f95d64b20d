"""Reads the request of a call and makes a message of it: after authentication, in bounded time, and with errors of ours.

grpc itself would receive and parse it before any interceptor runs, be the caller known or not, would wait for the rest of it
for ever, and would end a call whose bytes are no message with INTERNAL and without details.
"""

from typing import Any, Final

from flywheel_server.errors import MalformedRequestError
from flywheel_server.grpc_types import GrpcContext
from flywheel_server.interceptors.authentication import Authentication, Credentials
from flywheel_server.interceptors.methods import Method
from flywheel_server.operations import OperationWaiter

REQUEST_TIMEOUT: Final = 30.0
"""Seconds of running time in which a request must have arrived."""


class RequestReader:
    """Receives the requests of known callers.

    Arguments:
        max_message_bytes: The largest request, after decompression.
        waits: Ends the wait for a request that does not arrive in time.
        authentication: Confirms, once the request has arrived, that the caller may still call. The method begins right after
            that, without anything else in between.
    """

    def __init__(self, max_message_bytes: int, waits: OperationWaiter, authentication: Authentication) -> None:
        self._max_message_bytes = max_message_bytes
        self._waits = waits
        self._authentication = authentication

    async def receive(self, method: Method, context: GrpcContext, credentials: Credentials) -> Any:  # noqa: ANN401 - any method's request
        """Returns the request.

        Raises:
            IncompleteRequestError: The request has not arrived in time.
            RequestTooLargeError: The request is too large.
            MalformedRequestError: There is no request, or it is not a message of its type.
            EngineUnavailableError: The server stops.
            UnauthenticatedError: The caller may no longer call.
        """
        request = await method.receive(context, self._max_message_bytes, self._waits)
        if request is None:
            raise MalformedRequestError
        self._authentication.confirm(credentials)
        return request
