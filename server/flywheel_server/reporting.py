"""Reports on a server as its settings say: metrics, traces, and lines of calls in the log."""

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

from flywheel_server.metrics_endpoint import create_metrics, serving_metrics
from flywheel_server.settings import Settings
from flywheel_server.telemetry.call_log import CallLog
from flywheel_server.telemetry.calls import Calls
from flywheel_server.telemetry.otlp_factory import create_otlp

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from flywheel_server.gauges import ServerGauges
    from flywheel_server.telemetry.calls import CallObserver
    from flywheel_server.telemetry.otlp import Otlp
    from flywheel_server.workers.link import Link


class Reporting:
    """What a server reports, and to whom. Imports only what the settings ask for.

    Arguments:
        settings: The settings.
        link: The link to the parent, which serves the metrics of all workers; None if the server is one process.

    Attributes:
        calls: The records of the server's calls.
    """

    def __init__(self, settings: Settings, link: "Link | None") -> None:
        self._settings = settings
        self._link = link
        self._metrics = create_metrics(settings)
        self._observers: list[CallObserver] = [self._metrics] if self._metrics else []
        if settings.log_calls or settings.slow_call:
            self._observers.append(CallLog(settings.log_calls, settings.slow_call))
        self.calls = Calls(self._observers)

    @asynccontextmanager
    async def running(self, gauges_in: "Callable[[CollectorRegistry], ServerGauges]") -> AsyncIterator[None]:
        """Serves metrics, and sends traces and metrics, for the length of the context.

        Arguments:
            gauges_in: Adds the figures of the server to a registry. It is called only if there are metrics.

        Raises:
            OSError: The address of the metrics is taken.
            ValueError: Something is missing for traces, or a variable of OpenTelemetry is wrong.
        """
        async with AsyncExitStack() as stack:
            gauges = gauges_in(self._metrics.registry) if self._metrics else None
            if gauges is not None:
                await stack.enter_async_context(gauges.measuring_lag())
                if self._link:
                    self._link.report_metrics(gauges.report)
                elif self._settings.metrics_address is not None:
                    await stack.enter_async_context(serving_metrics(self._settings, gauges))
            if self._settings.otlp_endpoint is not None:
                otlp = self._send_traces(self._settings.otlp_endpoint)
                stack.push_async_callback(otlp.stop)
                if self._metrics and gauges is not None:
                    otlp.push_metrics(self._metrics.registry, gauges.refresh)
            stack.callback(self.calls.report)
            yield

    def _send_traces(self, endpoint: str) -> "Otlp":
        otlp = create_otlp(endpoint, is_one_of_several=self._link is not None)
        from flywheel_server.telemetry.tracing import CallTraces

        self._observers.append(
            CallTraces(
                otlp.tracer_provider,
                with_texts=self._settings.trace_prompts,
                max_attribute_characters=otlp.max_attribute_characters,
            )
        )
        return otlp
