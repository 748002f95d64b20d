"""The client for threads, and its streams."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar, Unpack

import grpc
from flywheel_proto.v1 import generation_pb2, generation_pb2_grpc
from google.protobuf.wrappers_pb2 import StringValue

from flywheel_client._channel import CLIENT_TIMEOUT, CallOptions, Timeout
from flywheel_client._client_base import BaseClient
from flywheel_client._errors import FlywheelError, error_from_call, request_id_in
from flywheel_client._health import HEALTH_CHECK, health_request, health_response, serving_status
from flywheel_client._many import DEFAULT_CONCURRENCY
from flywheel_client._many_sync import PromptResults
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


class _StreamCall(Protocol):
    """The part of grpc's server stream that `Stream` uses."""

    def __next__(self) -> Any: ...  # noqa: ANN401 - a message of the method, which `result_from` knows
    def initial_metadata(self) -> Sequence[tuple[str, str | bytes]] | None: ...
    def cancel(self) -> object: ...


class Stream(Generic[ResultT]):
    """Yields the results of a call as the server sends them.

    Iterating raises `FlywheelError` if the call fails. The call is cancelled on the server when a `with` block ends, by
    `close()`, by an exception that interrupts the wait for the next result, and when the last reference to the stream is gone.
    """

    def __init__(self, call: _StreamCall, result_from: Callable[[Any], ResultT], request_id: str) -> None:
        self._call = call
        self._result_from = result_from
        self._request_id = request_id
        self._begun = False
        self._ended = False

    @property
    def request_id(self) -> str:
        """The id of the call in the server's log: the id that was sent, or the one with which the server replaced it."""
        return self._request_id

    def __iter__(self) -> Iterator[ResultT]:
        return self

    def __next__(self) -> ResultT:
        if self._ended:
            raise StopIteration
        try:
            message = next(self._call)
        except StopIteration:
            self._ended = True
            raise
        except grpc.RpcError as error:
            self._ended = True
            raise error_from_call(error, self._request_id) from error
        except BaseException:
            self.close()
            raise
        if not self._begun:
            self._begun = True
            self._request_id = request_id_in(self._call.initial_metadata(), self._request_id)
        return self._result_from(message)

    def cancel(self) -> None:
        """Cancels the call on the server; iterating then raises `CallCancelledError`. Any thread may call this at any time."""
        self._call.cancel()

    def close(self) -> None:
        """Cancels the call unless it has ended, and ends the iteration."""
        if not self._ended:
            self._ended = True
            self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class Client(BaseClient):
    """A client of the generation service, for threads, which may share it.

    The client connects at its first call, in plaintext unless it has credentials. Use the client as a context manager, or
    `close()` it.

    Signal handlers and finalizers may close the client, and close or cancel its streams, at any time: these methods never wait
    for the code that was interrupted. A signal handler that has interrupted a call cannot make another call: that raises
    `RuntimeError`. Make the call in a thread, and do not wait for the thread in the handler. A finalizer (`__del__`) must make
    no calls: it may run in grpc's own thread, which would then wait for itself.
    """

    _channels: dict[bool, grpc.Channel]
    """The key says whether calls go to servers of any health."""

    def generate(
        self,
        text: str | None = None,
        *,
        timeout: Timeout = CLIENT_TIMEOUT,
        request_id: str | None = None,
        wait_for_ready: bool | None = None,
        **fields: Unpack[GenerationFields],
    ) -> Stream[Sample]:
        """Generates samples, and streams each finished sample as a whole, in the order in which they finish.

        Args:
            text: The prompt as a text. `Model.prompt_format` tells how the model reads it. The prompt may also be `messages`
                or `prompt_token_ids`; a request has exactly one of the three.
            timeout: The seconds that the call may take; None sets no deadline. Default: the client's timeout.
            request_id: The name of the call in the server's log: 1 to 128 visible ASCII characters. Default: a new id.
            wait_for_ready: Whether the call waits for a server that is ready. Default: the client's `wait_for_ready`.
            **fields: The other fields of the request, as in `GenerationFields`. `max_tokens` is required.

        Raises:
            TypeError: A field has the wrong type or is unknown; max_tokens or the prompt is missing; more than one of
                json_schema, regex and choices is given; or the timeout is not a number.
            ValueError: A value does not fit into its field, or the timeout is negative or NaN.
            FlywheelError: The call failed. Iterating over the stream raises this error.
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
    ) -> Stream[Delta]:
        """Generates samples, and streams their text as it is generated. `Delta.index` tells the samples apart.

        The arguments and errors are the same as for `generate`.
        """
        request = generation_request(text, **fields)
        options = self._connection.call_options(timeout, request_id, wait_for_ready)
        return self._stream(self._stub().GenerateDeltas, request, delta_from, options)

    def generate_all(
        self,
        text: str | None = None,
        *,
        timeout: Timeout = CLIENT_TIMEOUT,
        request_id: str | None = None,
        wait_for_ready: bool | None = None,
        **fields: Unpack[GenerationFields],
    ) -> Response:
        """Generates samples, and returns all of them, in the order of their index, when the last one has finished.

        The arguments and errors are the same as for `generate`, but this method itself raises `FlywheelError`.
        """
        request = generation_request(text, **fields)
        options = self._connection.call_options(timeout, request_id, wait_for_ready)
        return response_from(_unary(self._stub().GenerateAll, request, options))

    def generate_many(
        self,
        prompts: Iterable[Prompt],
        *,
        concurrency: int = DEFAULT_CONCURRENCY,
        timeout: Timeout = CLIENT_TIMEOUT,
        wait_for_ready: bool | None = None,
        **fields: Unpack[GenerationFields],
    ) -> PromptResults:
        """Generates samples for many prompts, several at a time, and yields the results as they come.

        If the call for a prompt fails, after its retries, the result of this prompt has the error: `PromptResult.response`
        raises it, and `PromptResult.error` returns it. The calls for other prompts go on. If you leave the iteration, all
        running calls are cancelled.

        Args:
            prompts: Texts, conversations (as `messages`), or mappings of fields, which override `fields`, such as
                `{"text": "Hello", "seed": 1}`. They may be endless: a prompt is read only when its call begins.
            concurrency: How many calls may run at the same time, each with a thread. A result that was not fetched yet counts
                as running.
            timeout: The seconds that each call may take; None sets no deadline. Default: the client's timeout.
            wait_for_ready: Whether a call waits for a server that is ready. Default: the client's `wait_for_ready`.
            **fields: The fields of all requests, as in `GenerationFields`. `max_tokens` is required.

        Raises:
            TypeError: As for `generate`; also for a prompt when it is read, which ends the iteration; or concurrency is not an
                integer.
            ValueError: As for `generate`; also for a prompt when it is read; or concurrency is less than 1.
        """
        timeout = self._connection.call_options(timeout).timeout

        def begin(request: generation_pb2.GenerationRequest) -> _UnaryCall[generation_pb2.GenerationResponse]:
            options = self._connection.call_options(timeout, wait_for_ready=wait_for_ready)
            return _UnaryCall(self._stub().GenerateAll, request, options)

        return PromptResults(begin, prompts, concurrency, **fields)

    def tokenize(
        self,
        text: str | None = None,
        *,
        messages: Messages | None = None,
        timeout: Timeout = CLIENT_TIMEOUT,
        request_id: str | None = None,
        wait_for_ready: bool | None = None,
    ) -> Tokens:
        """Returns the tokens of a prompt, as a generation with this prompt reads them. Generates nothing.

        Args:
            text: The prompt as a text, unless `messages` are given.
            messages: The prompt as a conversation, as in `GenerationFields`.
            timeout: The seconds that the call may take; None sets no deadline. Default: the client's timeout.
            request_id: The name of the call in the server's log: 1 to 128 visible ASCII characters. Default: a new id.
            wait_for_ready: Whether the call waits for a server that is ready. Default: the client's `wait_for_ready`.

        Raises:
            TypeError: There is no prompt, a message has the wrong type, or the timeout is not a number.
            ValueError: The prompt is not Unicode, or the timeout is negative or NaN.
            FlywheelError: The call failed. If the engine cannot tokenize, the code is UNIMPLEMENTED.
        """
        request = tokenize_request(text, messages)
        options = self._connection.call_options(timeout, request_id, wait_for_ready)
        return tokens_from(_unary(self._stub().Tokenize, request, options))

    def model(self, *, timeout: Timeout = CLIENT_TIMEOUT, wait_for_ready: bool | None = None) -> Model:
        """Returns the model, the engine that runs it, the limits of a request and the defaults of unset fields.

        Raises:
            UnavailableError: The engine has not started yet, or the server cannot be reached.
        """
        options = self._connection.call_options(timeout, wait_for_ready=wait_for_ready)
        return model_from(_unary(self._stub(any_health=True).GetModel, generation_pb2.GetModelRequest(), options))

    def stats(self, *, timeout: Timeout = CLIENT_TIMEOUT, wait_for_ready: bool | None = None) -> Stats:
        """Returns how busy the service is at this moment; raises `FlywheelError` if the call fails."""
        options = self._connection.call_options(timeout, wait_for_ready=wait_for_ready)
        return stats_from(_unary(self._stub(any_health=True).GetStats, generation_pb2.GetStatsRequest(), options))

    def health(self, service: str = "", *, timeout: Timeout = CLIENT_TIMEOUT, wait_for_ready: bool | None = None) -> str:
        """Returns the serving status of grpc.health.v1: `SERVING`, `NOT_SERVING` or `UNKNOWN`.

        Args:
            service: The full name of a service of the server. Default: the server as a whole.
            timeout: The seconds that the call may take; None sets no deadline. Default: the client's timeout.
            wait_for_ready: Whether the call waits for a server that can be reached. Default: the client's `wait_for_ready`.

        Raises:
            FlywheelError: The server cannot be reached, or does not know the service (code NOT_FOUND).
        """
        options = self._connection.call_options(timeout, wait_for_ready=wait_for_ready)
        check = self._channel(any_health=True).unary_unary(HEALTH_CHECK, health_request, health_response)
        return serving_status(_unary(check, StringValue(value=service), options))

    def close(self) -> None:
        """Closes the channel, which cancels running calls. The client makes no further calls.

        Any thread may call this, and also signal handlers and finalizers: see the class.
        """
        self._closed = True
        for channel in list(self._channels.values()):
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _channel(self, *, any_health: bool) -> grpc.Channel:
        any_health = any_health and self._connection.checks_health
        # No lock: a signal handler or finalizer that interrupts the holder of the lock would wait for it forever.
        channel = self._channels.get(any_health)
        if channel is None and not self._closed:
            opened = self._connection.open(any_health=any_health)
            channel = self._channels.setdefault(any_health, opened)
            if channel is not opened:
                opened.close()
        if channel is None or self._closed:
            if channel is not None:
                channel.close()
            raise RuntimeError("the client is closed")
        return channel

    def _stub(self, *, any_health: bool = False) -> generation_pb2_grpc.GenerationServiceStub:
        return generation_pb2_grpc.GenerationServiceStub(self._channel(any_health=any_health))

    def _stream(
        self,
        method: "grpc.UnaryStreamMultiCallable[generation_pb2.GenerationRequest, MessageT]",
        request: generation_pb2.GenerationRequest,
        result_from: Callable[[MessageT], ResultT],
        options: CallOptions,
    ) -> Stream[ResultT]:
        call = method(request, timeout=options.timeout, metadata=options.metadata, wait_for_ready=options.wait_for_ready)
        return Stream(call, result_from, options.request_id)


class _UnaryCall(Generic[MessageT]):
    """A running call whose answer is one message."""

    def __init__(
        self, method: "grpc.UnaryUnaryMultiCallable[RequestT, MessageT]", request: RequestT, options: CallOptions
    ) -> None:
        self._request_id = options.request_id
        # A blocking call could not be cancelled when Ctrl-C interrupts it. A future can.
        self._future = method.future(
            request, timeout=options.timeout, metadata=options.metadata, wait_for_ready=options.wait_for_ready
        )

    def answer(self) -> MessageT:
        """Waits for the answer, and returns it; raises `FlywheelError` if the call fails."""
        try:
            return self._future.result()
        except grpc.RpcError as error:
            raise error_from_call(error, self._request_id) from error

    def cancel(self) -> None:
        """Cancels the call on the server. Any thread may call this at any time."""
        self._future.cancel()


def _unary(method: "grpc.UnaryUnaryMultiCallable[RequestT, MessageT]", request: RequestT, options: CallOptions) -> MessageT:
    call = _UnaryCall(method, request, options)
    try:
        return call.answer()
    except FlywheelError:
        raise
    except BaseException:
        call.cancel()
        raise
