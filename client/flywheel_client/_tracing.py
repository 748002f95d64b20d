"""Makes a span of each call, by the semantic conventions of OpenTelemetry, in programs that use OpenTelemetry.

This module never imports OpenTelemetry. A program that has a tracer provider, or a current span, has imported it already.
"""

import sys
import threading
from collections.abc import Iterable
from typing import Any, Final

import grpc
from flywheel_proto import __version__
from flywheel_proto.v1 import generation_pb2

Metadata = tuple[tuple[str, str | bytes], ...]

SERVICE_PREFIX: Final = "/flywheel."
"""How the names of methods begin that have spans. Health checks have none."""

_REQUEST_FIELDS: Final = ("max_tokens", "temperature", "top_k", "top_p", "presence_penalty", "frequency_penalty", "seed")


class CallSpan:
    """The span of a call, through all its tries. This base class does nothing, for calls without a span.

    Attributes:
        headers: The headers of the trace, to add to the metadata of the call.
    """

    headers: Metadata = ()

    def retry(self, error: BaseException) -> None:
        """Notes that the call is tried again, after this error."""

    def receive(self, message: Any) -> None:  # noqa: ANN401 - a message of the method
        """Notes what the conventions say about a message."""

    def end(self, error: BaseException | None = None) -> None:
        """Ends the span with the status of the call: OK, or that of the error. Later calls do nothing.

        This takes locks of OpenTelemetry, so signal handlers and finalizers must not call it.
        """

    def cancel(self) -> None:
        """Ends the span of a call that the caller has cancelled, or has left; see `end`."""


NO_SPAN: Final = CallSpan()


class _RealSpan(CallSpan):
    def __init__(self, tracing: Any, method: str, request: object, metadata: Iterable[tuple[str, str | bytes]]) -> None:  # noqa: ANN401 - a module
        self._tracing = tracing
        name = method.removeprefix("/")
        attributes = {"rpc.system.name": "grpc", "rpc.method": name, **_request_attributes(request, name)}
        tracer = tracing.get_tracer("flywheel_client", __version__)
        self._span = tracer.start_span(name, kind=tracing.SpanKind.CLIENT, attributes=attributes)
        headers: dict[str, str] = {}
        # Without a tracer provider, the API has no span to start. Older versions then do not return the current span either.
        is_valid = self._span.get_span_context().is_valid
        _inject(headers, tracing.set_span_in_context(self._span) if is_valid else None)
        given = {key for key, _ in metadata}
        self.headers = tuple((key, value) for key, value in headers.items() if key not in given)
        self._records = self._span.is_recording()
        self._received = False
        self._generated_tokens = 0
        self._finish_reasons: list[str] = []
        self._prompt_tokens = 0
        self._end_lock = threading.Lock()
        self._ended = False

    def retry(self, error: BaseException) -> None:
        if self._records:
            self._span.add_event("retry", {"rpc.response.status_code": _code_of(error).name})

    def receive(self, message: Any) -> None:  # noqa: ANN401 - a message of the method
        if not self._records:
            return
        if not self._received:
            self._received = True
            self._span.add_event("first message")
        match message:
            case generation_pb2.GenerationResponse():
                for sample in message.responses:
                    self._note_sample(sample)
            case generation_pb2.GenerationDelta() | generation_pb2.GenerationResponseSample() if message.finish_reason:
                self._note_sample(message)

    def _note_sample(self, sample: Any) -> None:  # noqa: ANN401 - a sample, or its last delta
        self._generated_tokens += sample.generated_tokens
        self._finish_reasons.append(sample.finish_reason)
        self._prompt_tokens = sample.prompt_tokens

    def end(self, error: BaseException | None = None) -> None:
        with self._end_lock:
            if self._ended:
                return
            self._ended = True
        if self._records:
            code = grpc.StatusCode.OK if error is None else _code_of(error)
            attributes: dict[str, Any] = {"rpc.response.status_code": code.name}
            if self._finish_reasons:
                attributes["gen_ai.usage.input_tokens"] = self._prompt_tokens
                attributes["gen_ai.usage.output_tokens"] = self._generated_tokens
                attributes["gen_ai.response.finish_reasons"] = self._finish_reasons
            if code is not grpc.StatusCode.OK:
                attributes["error.type"] = code.name
                self._span.set_status(self._tracing.Status(self._tracing.StatusCode.ERROR))
            self._span.set_attributes(attributes)
        self._span.end()

    def cancel(self) -> None:
        self.end(_CancelledError())


class _CancelledError(Exception):
    """Stands for the status of a call that the caller has left."""


def start_span(method: str, request: object, metadata: Iterable[tuple[str, str | bytes]]) -> CallSpan:
    """Returns the span of a call; `NO_SPAN` unless the program uses OpenTelemetry.

    Without a tracer provider, the span is not recorded, but the call still passes on the headers of the current span.
    """
    tracing = sys.modules.get("opentelemetry.trace")
    # While another thread imports the module, it has not all of its names yet.
    if tracing is None or not method.startswith(SERVICE_PREFIX) or not hasattr(tracing, "get_tracer"):
        return NO_SPAN
    return _RealSpan(tracing, method, request, metadata)


def _inject(headers: dict[str, str], context: object) -> None:
    from opentelemetry.propagate import inject  # its package is loaded, as `start_span` has seen

    inject(headers, context=context)  # type: ignore[arg-type] # as OpenTelemetry made it


def _code_of(error: BaseException) -> grpc.StatusCode:
    """Returns the status of an error of grpc or of this client. An interrupted call was cancelled."""
    code = getattr(error, "code", None)
    code = code() if callable(code) else code
    return code if isinstance(code, grpc.StatusCode) else grpc.StatusCode.CANCELLED


def _request_attributes(request: object, method: str) -> dict[str, Any]:
    """Returns the attributes of a generation. They have no text of the request."""
    if not isinstance(request, generation_pb2.GenerationRequest):
        return {}
    optional = {"temperature", "top_k", "top_p", "seed"}
    given = [name for name in _REQUEST_FIELDS if name not in optional or request.HasField(name)]  # type: ignore[arg-type] # each is one
    return {
        "gen_ai.operation.name": "chat" if request.messages else "text_completion",
        "gen_ai.provider.name": "flywheel",
        "gen_ai.request.stream": not method.endswith("GenerateAll"),
        "gen_ai.request.choice.count": request.num_samples if request.HasField("num_samples") else 1,
        **{f"gen_ai.request.{name}": getattr(request, name) for name in given},
    }
