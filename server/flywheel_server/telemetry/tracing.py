"""Makes a span of each call, from its record, by the semantic conventions of OpenTelemetry for RPC and for GenAI."""

import os
from random import getrandbits
from typing import Final

import grpc
import structlog
from opentelemetry import context, propagate, trace
from opentelemetry.sdk.environment_variables import OTEL_TRACES_SAMPLER
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import Span, SpanKind, Status, StatusCode

from flywheel_server.grpc_types import Metadata
from flywheel_server.messages import CONSTRAINT_FIELDS, GenerationRequest
from flywheel_server.telemetry.calls import CallRecord
from flywheel_server.telemetry.rate_limit import RateLimit
from flywheel_server.telemetry.trace_context import inject_headers
from flywheel_server.telemetry.trace_texts import MAX_TEXT_CHARACTERS, text_attributes

MAX_TRACES_PER_SECOND: Final = 10
"""How many traces begin here each second, unless `OTEL_TRACES_SAMPLER` names one of the `SAMPLERS`.

To make a span and to send it takes half as much CPU as the cheapest call. So traces cost half a percent of a core at most.
"""

SAMPLERS: Final = frozenset(
    {
        "always_on",
        "always_off",
        "parentbased_always_on",
        "parentbased_always_off",
        "traceidratio",
        "parentbased_traceidratio",
    }
)
"""The samplers that OpenTelemetry's SDK has, as `OTEL_TRACES_SAMPLER` names them in upper or lower case.

For any other value, the SDK logs a warning and samples every trace.
"""

MAX_REFUSALS_PER_SECOND: Final = 10
"""How many spans a second may be of calls that failed before they joined the queue.

Strangers, who have no key, can cause these calls. The queue to the receiver is bounded, so that without this limit, they could
crowd out all other spans.
"""

MAX_NAME_CHARACTERS: Final = 256
"""Maximum length of a name in an attribute, such as that of a caller."""

INFRASTRUCTURE: Final = "grpc."
"""How the names of services begin that probes and tools call, such as `grpc.health.v1.Health`. Their calls have no spans."""

SERVER_ERRORS: Final = frozenset(
    {
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    }
)
"""The statuses that are errors of the server, by the semantic conventions for gRPC."""

Attributes = dict[str, str | int | float | bool | list[str]]


_NOBODY: Final = context.Context()
"""The context of a caller that has no span."""


class _UnsampledSpan(trace.NonRecordingSpan):
    """The span of a call whose trace begins here and is not sampled, so that nothing on behalf of the call is sampled either.

    Draws its ids when they are asked for, because most calls pass on no trace.
    """

    def __init__(self) -> None:
        super().__init__(trace.INVALID_SPAN_CONTEXT)

    def get_span_context(self) -> trace.SpanContext:
        """Returns the ids, which mark the trace as not sampled."""
        if self._context is trace.INVALID_SPAN_CONTEXT:
            self._context = trace.SpanContext(getrandbits(128), getrandbits(64), is_remote=False)
        return self._context


class CallTraces:
    """Observes calls, and makes a span of each; see `CallObserver`.

    The span is a child of the caller's span if the metadata have one (`traceparent`), and its trace is sampled if that one is.
    While a call runs, its span is OpenTelemetry's current span, and its log lines have the `trace_id`, unless the trace begins
    here and is not sampled.

    Arguments:
        provider: Makes the spans.
        with_texts: Whether the spans have the text of prompts and samples.
        max_attribute_characters: Characters that the provider leaves of an attribute; None if it leaves all.
    """

    def __init__(
        self, provider: trace.TracerProvider, *, with_texts: bool, max_attribute_characters: int | None = None
    ) -> None:
        self._tracer = provider.get_tracer("flywheel_server")
        self._with_texts = with_texts
        self._max_text_characters = MAX_TEXT_CHARACTERS if max_attribute_characters is None else max_attribute_characters
        is_sampler_set = os.environ.get(OTEL_TRACES_SAMPLER, "").lower() in SAMPLERS
        self._traces = None if is_sampler_set else RateLimit(MAX_TRACES_PER_SECOND)
        self._refusals = RateLimit(MAX_REFUSALS_PER_SECOND)
        self._spans: dict[CallRecord, Span] = {}
        self._propagated = propagate.get_global_textmap().fields
        """The names of metadata that may have the caller's span."""

    def begin(self, call: CallRecord, metadata: Metadata) -> None:
        """Starts the span of a call, in the context of the call."""
        if call.method.startswith(INFRASTRUCTURE):
            return
        caller = _NOBODY
        if headers := {name: value for name, value in metadata if name in self._propagated and isinstance(value, str)}:
            caller = propagate.extract(headers, caller)
        span = self._start(call, caller)
        # Never detached: the call has a context of its own, which ends with the call.
        context.attach(trace.set_span_in_context(span, caller))
        inject_headers.set(propagate.inject)
        if span.is_recording():
            self._spans[call] = span
            call.texts = [] if self._with_texts else None

    def _start(self, call: CallRecord, caller: context.Context) -> Span:
        begins_here = caller is _NOBODY or not trace.get_current_span(caller).get_span_context().is_valid
        if begins_here and self._traces is not None and not self._traces.take():
            return _UnsampledSpan()
        span = self._tracer.start_span(call.method, caller, SpanKind.SERVER, start_time=call.began_ns)
        trace_id = span.get_span_context().trace_id
        if trace_id != trace.INVALID_TRACE_ID:
            call.trace_id = trace.format_trace_id(trace_id)
            structlog.contextvars.bind_contextvars(trace_id=call.trace_id)
        return span

    def end(self, call: CallRecord) -> None:
        """Ends the span of a call, with what its record has."""
        span = self._spans.pop(call, None)
        if span is None:
            return
        if call.phase == "request" and call.code is not grpc.StatusCode.OK:
            if self._traces is not None and isinstance(span, ReadableSpan) and span.parent is None:
                self._traces.give_back()  # otherwise strangers could leave none for others
            if not self._refusals.take():
                return  # a span that does not end is not sent
        span.set_attributes(_attributes(call))
        if self._with_texts and call.request is not None:
            span.set_attributes(_texts(call, call.request, self._max_text_characters))
        for seconds, event, attributes in _events(call):
            span.add_event(event, attributes, _epoch_ns(call, seconds))
        if call.code in SERVER_ERRORS:
            # The error itself may have text of the caller: it is in the log only.
            span.set_status(Status(StatusCode.ERROR, call.reason or None))
        span.end(_epoch_ns(call, call.ended_at or call.began))


def _epoch_ns(call: CallRecord, seconds: float) -> int:
    """Returns a time of the record in nanoseconds since the epoch."""
    return call.began_ns + round((seconds - call.began) * 1e9)


def _attributes(call: CallRecord) -> Attributes:
    code = call.code or grpc.StatusCode.UNKNOWN
    attributes: Attributes = {
        "rpc.system.name": "grpc",
        "rpc.method": call.method,
        "rpc.response.status_code": code.name,
        "flywheel.request_id": call.request_id,
        **(call.peer_address() if call.peer else {}),
    }
    if code in SERVER_ERRORS:
        attributes["error.type"] = code.name
    if code is grpc.StatusCode.CANCELLED:
        attributes["flywheel.phase"] = call.phase
    if call.reason:
        attributes["flywheel.reason"] = call.reason
    if call.caller:
        attributes["flywheel.caller"] = call.caller[:MAX_NAME_CHARACTERS]
    if call.request is not None:
        attributes |= {"gen_ai.request.model": call.model, "gen_ai.provider.name": "flywheel"}
        if call.prompt_tokens:
            attributes["gen_ai.usage.input_tokens"] = call.prompt_tokens
        if call.operation:
            attributes |= _generation(call, call.request)
    return attributes


def _generation(call: CallRecord, request: GenerationRequest) -> Attributes:
    attributes: Attributes = {
        "gen_ai.operation.name": call.operation,
        "gen_ai.output.type": "json" if request.json_schema else "text",
        "gen_ai.request.choice.count": request.num_samples,
        "gen_ai.request.max_tokens": request.max_tokens,
        "gen_ai.request.temperature": request.temperature,
        "gen_ai.request.top_k": request.top_k,
        "gen_ai.request.top_p": request.top_p,
        "gen_ai.request.presence_penalty": request.presence_penalty,
        "gen_ai.request.frequency_penalty": request.frequency_penalty,
        "gen_ai.request.stream": not call.method.endswith("GenerateAll"),
        "gen_ai.usage.output_tokens": call.generated_tokens,
    }
    if request.seed is not None:
        attributes["gen_ai.request.seed"] = request.seed
    if constraint := next((name for name in CONSTRAINT_FIELDS if getattr(request, name)), ""):
        attributes["flywheel.constraint"] = constraint
    if call.samples:
        attributes["gen_ai.response.finish_reasons"] = [reason[:MAX_NAME_CHARACTERS] for _, _, reason in call.samples]
    if call.first_output_at is not None:
        attributes["gen_ai.response.time_to_first_chunk"] = call.first_output_at - call.began
    return attributes


def _texts(call: CallRecord, request: GenerationRequest, max_characters: int) -> Attributes:
    """Returns prompt and samples in the JSON of the conventions. A prompt of token ids has no text."""
    prompts = [(message.role, message.content) for message in request.messages] or [("user", request.text)]
    samples = [("assistant", text) for text in call.texts or ()]
    return {**text_attributes("input", prompts, max_characters), **text_attributes("output", samples, max_characters)}


def _events(call: CallRecord) -> list[tuple[float, str, Attributes]]:
    """Returns the events of a call, each with its time in the seconds of the record."""
    moments = {
        "queued": call.queued_at,
        "admitted": call.admitted_at,
        "started": call.started_at,
        "first token": call.first_output_at,
    }
    events: list[tuple[float, str, Attributes]] = [(at, name, {}) for name, at in moments.items() if at is not None]
    for at, tokens, reason in call.samples:
        attributes: Attributes = {"gen_ai.usage.output_tokens": tokens, "flywheel.finish_reason": reason[:MAX_NAME_CHARACTERS]}
        events.append((at, "finished", attributes))
    return events
