"""Traces the calls of the Model on Modal: each is a span, a child of the gateway's span, sent from the Model's container."""

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import structlog
from flywheel_proto._extras import DISTRIBUTION

from flywheel_server.engines.base import EngineSetupError, Event, Sink, Started

try:
    from opentelemetry import context, propagate, trace
    from opentelemetry.trace import Span, SpanKind, Status, StatusCode

    from flywheel_server.telemetry.otlp import Otlp
except ImportError as error:
    raise EngineSetupError(
        f"no traces: {error}; install what is missing: pip install '{DISTRIBUTION}[otel]'",
        {"setting": "FLYWHEEL_OTLP_ENDPOINT"},
    ) from error


class ModelSpans:
    """Makes the spans of calls, and sends them until `stop`.

    Arguments:
        endpoint: The URL of the receiver; see `Otlp`.
    """

    def __init__(self, endpoint: str) -> None:
        self._otlp = Otlp(endpoint, "flywheel-model")
        self._tracer = self._otlp.tracer_provider.get_tracer("flywheel_server")

    @contextmanager
    def call(self, method: str, headers: Mapping[str, str] | None) -> Iterator["CallSpan"]:
        """Yields the span of a call, which ends with the context.

        Arguments:
            method: The method of the Model.
            headers: The headers of the caller's trace; see `trace_headers`.
        """
        parent = propagate.extract(headers or {}, context.Context())
        span = self._tracer.start_span(f"Model.{method}", parent, SpanKind.SERVER)
        structlog.contextvars.bind_contextvars(trace_id=trace.format_trace_id(span.get_span_context().trace_id))
        try:
            yield CallSpan(span)
        except asyncio.CancelledError:
            span.add_event("cancelled")
            raise
        except Exception as error:
            # The text of the error may have text of the caller.
            span.set_status(Status(StatusCode.ERROR, type(error).__name__))
            span.set_attribute("error.type", type(error).__name__)
            raise
        finally:
            span.end()

    async def stop(self) -> None:
        """Sends what has not been sent yet; see `Otlp.stop`."""
        await self._otlp.stop()


class CallSpan:
    """The span of a call."""

    def __init__(self, span: Span) -> None:
        self._span = span

    def watching(self, sink: Sink) -> Sink:
        """Returns a sink that notes the first events in the span, and passes all events on."""
        return _NotingSink(sink, self._span) if self._span.is_recording() else sink


class _NotingSink:
    def __init__(self, sink: Sink, span: Span) -> None:
        self._sink = sink
        self._span = span
        self._awaits_token = True

    @property
    def is_full(self) -> bool:
        """See `Sink.is_full`."""
        return self._sink.is_full

    def emit(self, event: Event) -> None:
        """Notes the event if it is the first of its kind, and passes it on."""
        if isinstance(event, Started):
            self._span.add_event("started")
        elif self._awaits_token:
            self._awaits_token = False
            self._span.add_event("first token")
        self._sink.emit(event)
