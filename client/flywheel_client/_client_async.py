"""The client for asyncio, and its streams."""

# ruff: noqa: ASYNC109 - each timeout becomes the deadline of a call, which the server obeys too

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, Unpack

import grpc
import grpc.aio
from flywheel_proto.v1 import generation_pb2, generation_pb2_grpc
from google.protobuf.wrappers_pb2 import StringValue

from flywheel_client._channel import CLIENT_TIMEOUT, CallOptions, Timeout
from flywheel_client._client_base import BaseClient
from flywheel_client._errors import error_from_call, request_id_in
from flywheel_client._health import HEALTH_CHECK, health_request, health_response, serving_status
from flywheel_client._many import DEFAULT_CONCURRENCY
from flywheel_client._many_async import AsyncPromptResults
from flywheel_client._request import GenerationFields, Messages, Prompt, generation_request, tokenize_request
from flywheel_client._results import (
    Delta,
    Model,
    Response,
    Sample,
    Stats,
    Tokens,
    delta_from,
    model_from,
    response_from,
    sample_from,
    stats_from,
    tokens_from,
)

RequestT = TypeVar("RequestT")
MessageT = TypeVar("MessageT")
ResultT = TypeVar("ResultT")


class AsyncStream(Generic[ResultT]):
    """Yields the results of a call as the server sends them.

    Iterating raises `FlywheelError` if the call fails. The call is cancelled on the server when an `async with` block ends, by
    `aclose()`, by an exception or cancellation that interrupts the wait for the next result, and when the last reference to
    the stream is gone.
    """

    def __init__(
        self, call: "grpc.aio.UnaryStreamCall[Any, Any]", result_from: Callable[[Any], ResultT], request_id: str
    ) -> None:
        self._call = call
        self._loop = asyncio.get_running_loop()
        self._messages = aiter(call)
        self._result_from = result_from
        self._request_id = request_id
        self._begun = False
        self._ended = False

    @property
    def request_id(self) -> str:
        """The id of the call in the server's log: the id that was sent, or the one with which the server replaced it."""
        return self._request_id

    def __aiter__(self) -> AsyncIterator[ResultT]:
        return self

    async def __anext__(self) -> ResultT:
        if self._ended:
            raise StopAsyncIteration
        if asyncio.get_running_loop() is not self._loop:
            # A loop that closes ends its streams early. Such a stream must not look complete in another loop.
            raise RuntimeError("the stream belongs to another event loop")
        try:
            message = await anext(self._messages)
            if not self._begun:
                self._begun = True
                self._request_id = request_id_in(await self._call.initial_metadata(), self._request_id)
        except StopAsyncIteration:
            self._ended = True
            raise
        except grpc.aio.AioRpcError as error:
            self._ended = True
            raise error_from_call(error, self._request_id) from error
        except BaseException:
            await self.aclose()
            raise
        return self._result_from(message)

    def cancel(self) -> None:
        """Cancels the call on the server; iterating then raises `CallCancelledError`. Call this in the stream's event loop."""
        self._call.cancel()

    async def aclose(self) -> None:
        """Cancels the call unless it has ended, and ends the iteration."""
        if not self._ended:
            self._ended = True
            self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        # grpc keeps a reference to each call, and so never cancels a call that was dropped (grpc#43462). The garbage collector
        # may run in any thread. If the loop is closed, it has ended `_messages`, and with it the call.
        if not self._ended and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._call.cancel)


class AsyncClient(BaseClient):
    """A client of the generation service, for asyncio.

    The client connects at its first call, in plaintext unless it has credentials. A channel belongs to one event loop, so each
    loop that uses the client gets its own channel. Use the client as a context manager, or `close()` it.
    """

    _channels: dict[tuple[asyncio.AbstractEventLoop, bool], grpc.aio.Channel]
    """The key is an event loop, and whether calls go to servers of any health.

    Several threads may run a loop each, so that the client uses only atomic operations on this dict.
    """

    def generate(
        self,
        text: str | None = None,
        *,
        timeout: Timeout = CLIENT_TIMEOUT,
        request_id: str | None = None,
        wait_for_ready: bool | None = None,
        **fields: Unpack[GenerationFields],
    ) -> AsyncStream[Sample]:
        """Generates samples, and streams each finished sample as a whole, in the order in which they finish.

        The arguments and errors are the same as for `Client.generate`.
        """
        request = generation_request(text, **fields)
        options = self._connection.call_options(timeout, request_id, wait_for_ready)
        return self._stream(self._stub().Generate, request, sample_from, options)

    def generate_deltas(
        self,
        text: str | None = None,
        *,
        timeout: Timeout = CLIENT_TIMEOUT,
        request_id: str | None = None,
        wait_for_ready: bool | None = None,
        **fields: Unpack[GenerationFields],
    ) -> AsyncStream[Delta]:
        """Generates samples, and streams their text as it is generated. `Delta.index` tells the samples apart.

        The arguments and errors are the same as for `Client.generate`.
        """
        request = generation_request(text, **fields)
        options = self._connection.call_options(timeout, request_id, wait_for_ready)
        return self._stream(self._stub().GenerateDeltas, request, delta_from, options)

    async def generate_all(
        self,
        text: str | None = None,
        *,
        timeout: Timeout = CLIENT_TIMEOUT,
        request_id: str | None = None,
        wait_for_ready: bool | None = None,
        **fields: Unpack[GenerationFields],
    ) -> Response:
        """Generates samples, and returns all of them, in the order of their index, when the last one has finished.

        The arguments and errors are the same as for `Client.generate`, but this method itself raises `FlywheelError`.
        """
        request = generation_request(text, **fields)
        options = self._connection.call_options(timeout, request_id, wait_for_ready)
        return response_from(await _unary(self._stub().GenerateAll, request, options))

    def generate_many(
        self,
        prompts: Iterable[Prompt] | AsyncIterable[Prompt],
        *,
        concurrency: int = DEFAULT_CONCURRENCY,
        timeout: Timeout = CLIENT_TIMEOUT,
        wait_for_ready: bool | None = None,
        **fields: Unpack[GenerationFields],
    ) -> AsyncPromptResults:
        """Generates samples for many prompts, several at a time, and yields the results as they come.

        The arguments and errors are the same as for `Client.generate_many`. The prompts may also be an asynchronous iterable.
        """
        timeout = self._connection.call_options(timeout).timeout

        async def answer(request: generation_pb2.GenerationRequest) -> generation_pb2.GenerationResponse:
            options = self._connection.call_options(timeout, wait_for_ready=wait_for_ready)
            return await _unary(self._stub().GenerateAll, request, options)

        return AsyncPromptResults(answer, prompts, concurrency, **fields)

    async def tokenize(
        self,
        text: str | None = None,
        *,
        messages: Messages | None = None,
        timeout: Timeout = CLIENT_TIMEOUT,
        request_id: str | None = None,
        wait_for_ready: bool | None = None,
    ) -> Tokens:
        """Returns the tokens of a prompt, as a generation with this prompt reads them. Generates nothing.

        The arguments and errors are the same as for `Client.tokenize`.
        """
        request = tokenize_request(text, messages)
        options = self._connection.call_options(timeout, request_id, wait_for_ready)
        return tokens_from(await _unary(self._stub().Tokenize, request, options))

    async def model(self, *, timeout: Timeout = CLIENT_TIMEOUT, wait_for_ready: bool | None = None) -> Model:
        """Returns the model, the engine that runs it, the limits of a request and the defaults of unset fields.

        Raises:
            UnavailableError: The engine has not started yet, or the server cannot be reached.
        """
        options = self._connection.call_options(timeout, wait_for_ready=wait_for_ready)
        return model_from(await _unary(self._stub(any_health=True).GetModel, generation_pb2.GetModelRequest(), options))

    async def stats(self, *, timeout: Timeout = CLIENT_TIMEOUT, wait_for_ready: bool | None = None) -> Stats:
        """Returns how busy the service is at this moment; raises `FlywheelError` if the call fails."""
        options = self._connection.call_options(timeout, wait_for_ready=wait_for_ready)
        return stats_from(await _unary(self._stub(any_health=True).GetStats, generation_pb2.GetStatsRequest(), options))

    async def health(self, service: str = "", *, timeout: Timeout = CLIENT_TIMEOUT, wait_for_ready: bool | None = None) -> str:
        """Returns the serving status of grpc.health.v1: `SERVING`, `NOT_SERVING` or `UNKNOWN`.

        The arguments and errors are the same as for `Client.health`.
        """
        options = self._connection.call_options(timeout, wait_for_ready=wait_for_ready)
        check = self._channel(any_health=True).unary_unary(HEALTH_CHECK, health_request, health_response)
        return serving_status(await _unary(check, StringValue(value=service), options))

    async def close(self) -> None:
        """Closes the channel of the running loop, which cancels its calls. The client makes no further calls."""
        self._closed = True
        running = asyncio.get_running_loop()
        for key in [(running, False), (running, True)]:
            if channel := self._channels.pop(key, None):
                await channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def _channel(self, *, any_health: bool) -> grpc.aio.Channel:
        if self._closed:
            raise RuntimeError("the client is closed")
        key = asyncio.get_running_loop(), any_health and self._connection.checks_health
        if key not in self._channels:
            # A channel can be closed only in its loop. If the loop is closed, the channel is dropped.
            for loop, for_any_health in list(self._channels):
                if loop.is_closed():
                    self._channels.pop((loop, for_any_health), None)
            self._channels[key] = self._connection.open_async(any_health=key[1])
        return self._channels[key]

    def _stub(self, *, any_health: bool = False) -> "generation_pb2_grpc.GenerationServiceAsyncStub":
        return generation_pb2_grpc.GenerationServiceStub(self._channel(any_health=any_health))

    def _stream(
        self,
        method: "grpc.aio.UnaryStreamMultiCallable[generation_pb2.GenerationRequest, MessageT]",
        request: generation_pb2.GenerationRequest,
        result_from: Callable[[MessageT], ResultT],
        options: CallOptions,
    ) -> AsyncStream[ResultT]:
        call = method(request, timeout=options.timeout, metadata=options.metadata, wait_for_ready=options.wait_for_ready)
        return AsyncStream(call, result_from, options.request_id)


async def _unary(
    method: "grpc.aio.UnaryUnaryMultiCallable[RequestT, MessageT]", request: RequestT, options: CallOptions
) -> MessageT:
    try:
        return await method(request, timeout=options.timeout, metadata=options.metadata, wait_for_ready=options.wait_for_ready)
    except grpc.aio.AioRpcError as error:
        raise error_from_call(error, options.request_id) from error
