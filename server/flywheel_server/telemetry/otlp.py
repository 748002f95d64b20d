"""Sends traces and metrics of this process to an OTLP receiver.

The threads of OpenTelemetry's SDK and of `OtlpMetrics` send them. If the receiver is slow or cannot be reached, spans are lost,
and no call is delayed. The variables `OTEL_*` configure the rest, such as headers, certificates, sampling and the resource.
"""

import asyncio
import os
import threading
import uuid
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Final

from flywheel_proto import __version__
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.environment_variables import OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT, OTEL_SDK_DISABLED
from opentelemetry.sdk.resources import (
    SERVICE_INSTANCE_ID,
    SERVICE_NAME,
    SERVICE_VERSION,
    OTELResourceDetector,
    Resource,
)
from opentelemetry.sdk.trace import SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from prometheus_client.registry import Collector

from flywheel_server.telemetry.otlp_metrics import OtlpMetrics

MAX_ATTRIBUTE_CHARACTERS: Final = 16_384
"""Maximum length of an attribute, unless `OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT` says otherwise. Only prompts get that long."""

STOP_TIMEOUT: Final = 2.0
"""Seconds that `Otlp.stop` waits for the receiver to take what has not been sent yet."""


class Otlp:
    """Sends spans, and metrics if `push_metrics` is called, until `stop`.

    Arguments:
        endpoint: The URL of the receiver, which speaks gRPC; http means plaintext, https TLS.
        service: The name of the service, unless `OTEL_SERVICE_NAME` or `OTEL_RESOURCE_ATTRIBUTES` name it.
        is_worker: Whether this process is one of several, which may share their environment.

    Attributes:
        tracer_provider: Makes tracers whose spans are sent.
        max_attribute_characters: Maximum length of an attribute of a span. OpenTelemetry cuts longer ones; None for no maximum.
    """

    def __init__(self, endpoint: str, service: str, *, is_worker: bool = False) -> None:
        self._endpoint = endpoint
        self._resource = _resource(service, is_worker=is_worker)
        length = os.environ.get(OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT, "")
        limits = SpanLimits(max_attribute_length=None if length.strip() else MAX_ATTRIBUTE_CHARACTERS)
        self.max_attribute_characters: int | None = limits.max_span_attribute_length
        self._span_exporter = OTLPSpanExporter(endpoint)
        # `stop` does what the provider would do at the exit of the process, within a time limit.
        self.tracer_provider = TracerProvider(resource=self._resource, span_limits=limits, shutdown_on_exit=False)
        self.tracer_provider.add_span_processor(BatchSpanProcessor(self._span_exporter))
        self._metrics: OtlpMetrics | None = None

    def push_metrics(self, collector: Collector, refresh: Callable[[], Coroutine[Any, Any, None]] | None = None) -> None:
        """Sends the metrics of a collector, such as a `CollectorRegistry`, from time to time, and a last time in `stop`.

        `refresh` runs on the event loop before each time. It finds out what the collector does not know by itself.
        """
        if os.environ.get(OTEL_SDK_DISABLED, "").strip().lower() != "true":
            self._metrics = OtlpMetrics(collector, OTLPMetricExporter(self._endpoint), self._resource, refresh)

    async def stop(self) -> None:
        """Sends what has not been sent yet, and returns at most `STOP_TIMEOUT` seconds later."""
        stops: list[tuple[Callable[[], None], Callable[[], None]]] = [
            (self.tracer_provider.shutdown, self._span_exporter.shutdown)
        ]
        if self._metrics is not None:
            stops.append((self._metrics.stop, self._metrics.give_up))
        await asyncio.gather(*(_stop(flush, give_up) for flush, give_up in stops))


async def _stop(flush: Callable[[], None], give_up: Callable[[], None]) -> None:
    """Runs `flush` for at most `STOP_TIMEOUT` seconds, and then `give_up`, which ends its waits."""
    loop = asyncio.get_running_loop()
    done = asyncio.Event()

    def run() -> None:
        try:
            flush()
        finally:
            if not loop.is_closed():
                loop.call_soon_threadsafe(done.set)

    # Not a thread of an executor: the process would wait for it at its exit.
    threading.Thread(target=run, name="flywheel-otlp-stop", daemon=True).start()
    try:
        with suppress(TimeoutError):
            async with asyncio.timeout(STOP_TIMEOUT):
                await done.wait()
    finally:
        if not done.is_set():
            give_up()


def _resource(service: str, *, is_worker: bool) -> Resource:
    """Returns what names this process to the receiver. The environment wins, as OpenTelemetry's SDK has it."""
    own: dict[str, str] = {SERVICE_NAME: service, SERVICE_VERSION: __version__, SERVICE_INSTANCE_ID: str(uuid.uuid4())}
    given = OTELResourceDetector().detect()
    if is_worker and (instance := given.attributes.get(SERVICE_INSTANCE_ID)):
        # All workers have this variable, and a receiver would mix up their metrics.
        given = given.merge(Resource({SERVICE_INSTANCE_ID: f"{instance}-{os.getpid()}"}))
    return Resource.create(own).merge(given)
