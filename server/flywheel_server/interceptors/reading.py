"""Receives and parses the request of a call after authentication, within a timeout.

grpc itself would receive and parse the request before any interceptor runs, even from an unknown caller. It would wait without
a limit for the rest of a request, and would end a call with malformed bytes with INTERNAL and without details.
"""

from typing import Any, Final

from flywheel_server.errors import MalformedRequestError
from flywheel_server.grpc_types import GrpcContext
from flywheel_server.interceptors.authentication import Authentication, Credentials
from flywheel_server.interceptors.methods import Method
from flywheel_server.operations import OperationWaiter

REQUEST_TIMEOUT: Final = 30.0
"""Seconds of running time within which a request must arrive."""


class RequestReader:
    """Receives the requests of authenticated callers.

    Arguments:
        max_message_bytes: Maximum size of a request, after decompression.
        waits: Ends the wait for a request that does not arrive in time.
        authentication: Authenticates the caller again when the request has arrived, immediately before the method starts.
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
            MalformedRequestError: There is no request, or it is not a message of the method's type.
            EngineUnavailableError: The server stops.
            UnauthenticatedError: The caller's key or certificate is no longer accepted.
        """
        request = await method.receive(context, self._max_message_bytes, self._waits)
        if request is None:
            raise MalformedRequestError
        self._authentication.confirm(credentials)
        return request
