"""Reads the request of a call and makes a message of it: after authentication, in bounded time, and with errors of ours.

grpc itself would receive and parse it before any interceptor runs, be the caller known or not, would wait for the rest of it
for ever, and would end a call whose bytes are no message with INTERNAL and without details.
"""

from collections.abc import Callable
from typing import Any, Final

from flywheel_server import running_time
from flywheel_server.errors import IncompleteRequestError, MalformedRequestError
from flywheel_server.interceptors.base import Call, CallInterceptor, Context, Handler
from flywheel_server.interceptors.methods import Method
from flywheel_server.interceptors.public import is_public
from flywheel_server.stopping import Interruptions

REQUEST_TIMEOUT: Final = 30.0
"""Seconds of running time in which a request must have arrived."""


class ReadingInterceptor(CallInterceptor):
    """The innermost interceptor of methods that need authentication: they get the message, and write their own.

    Args:
        max_message_bytes: The largest request, after decompression.
        interruptions: End the wait for a request.
        on_arrival: Is called once the request has arrived, and raises if the call may not go on. The method begins right after
            it, without anything else in between.
    """

    def __init__(self, max_message_bytes: int, interruptions: Interruptions, on_arrival: Callable[[Context], None]) -> None:
        self._max_message_bytes = max_message_bytes
        self._interruptions = interruptions
        self._on_arrival = on_arrival

    def covers(self, method: str) -> bool:
        """Returns whether the method needs authentication."""
        return not is_public(method)

    async def around(self, call: Call, context: Context) -> None:
        """Runs the call."""
        await call(context)

    def inner(self, handler: Handler) -> Call:
        """Returns the method, which gets the message.

        It raises `IncompleteRequestError`, `MalformedRequestError`, and `EngineUnavailableError` if the server stops.
        """
        method = Method(handler)

        async def call(context: Context) -> None:
            await method.answer(await self._request(method, context), context)

        return call

    async def _request(self, method: Method, context: Context) -> Any:  # noqa: ANN401 - any method's request
        try:
            async with self._interruptions.interruptible(), running_time.timeout(REQUEST_TIMEOUT):
                request = await method.receive(context, self._max_message_bytes)
        except TimeoutError as error:
            raise IncompleteRequestError from error
        if request is None:
            raise MalformedRequestError
        self._on_arrival(context)
        return request
