"""A receiver of OTLP over gRPC, which keeps what it is sent."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.serving import until


def attributes_of(message: Any) -> dict[str, Any]:
    """Returns the attributes of a span, an event, a resource or a data point as Python's values."""
    return {attribute.key: _value(attribute.value) for attribute in message.attributes}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    return [_value(each) for each in value.array_value.values] if kind == "array_value" else getattr(value, kind)


class Receiver(trace_service_pb2_grpc.TraceServiceServicer, metrics_service_pb2_grpc.MetricsServiceServicer):
    """Keeps the spans, each with the resource that sent it, and the latest metrics of each resource."""

    endpoint = ""

    def __init__(self) -> None:
        self.spans: list[tuple[Span, dict[str, Any]]] = []
        self.metrics: dict[str, dict[str, Any]] = {}

    async def Export(self, request: Any, context: Any) -> Any:
        if isinstance(request, trace_service_pb2.ExportTraceServiceRequest):
            for resource_spans in request.resource_spans:
                resource = attributes_of(resource_spans.resource)
                self.spans += [(span, resource) for scope in resource_spans.scope_spans for span in scope.spans]
            return trace_service_pb2.ExportTraceServiceResponse()
        for resource_metrics in request.resource_metrics:
            instance = attributes_of(resource_metrics.resource)["service.instance.id"]
            metrics = {metric.name: metric for scope in resource_metrics.scope_metrics for metric in scope.metrics}
            self.metrics[instance] = metrics
        return metrics_service_pb2.ExportMetricsServiceResponse()

    async def span(self, name: str, **attributes: Any) -> Span:
        """Waits for a span whose name ends so and that has these attributes, with underscores for periods."""
        found: list[Span] = []

        def has_come() -> bool:
            for span, _ in self.spans:
                values = {key.replace(".", "_"): value for key, value in attributes_of(span).items()}
                if span.name.endswith(name) and attributes.items() <= values.items():
                    found.append(span)
            return bool(found)

        await until(has_come, f"a span {name} with {attributes}", 20)
        return found[0]

    def resource_of(self, span: Span) -> dict[str, Any]:
        return next(resource for each, resource in self.spans if each.span_id == span.span_id)


@asynccontextmanager
async def receiving() -> AsyncIterator[Receiver]:
    """Gives a receiver on a free port."""
    receiver, server = Receiver(), grpc.aio.server()
    traces: Any = trace_service_pb2_grpc  # which has no types
    metrics: Any = metrics_service_pb2_grpc
    traces.add_TraceServiceServicer_to_server(receiver, server)
    metrics.add_MetricsServiceServicer_to_server(receiver, server)
    receiver.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield receiver
    finally:
        await server.stop(0)
