"""Reads the figures that the server keeps anyway, each time its metrics are collected. Imported only if there are metrics."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from typing import Final

from flywheel_proto import __version__
from prometheus_client import ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector, CollectorRegistry

from flywheel_server import logs, running_time
from flywheel_server.activity import stats_of
from flywheel_server.admission import Admission
from flywheel_server.engines.base import EngineModel, EngineStats
from flywheel_server.generations import Generations
from flywheel_server.supervision import Supervisor
from flywheel_server.system import descriptors
from flywheel_server.telemetry import loop_lag
from flywheel_server.telemetry.calls import Calls
from flywheel_server.telemetry.expiry import Expiry
from flywheel_server.telemetry.merging import Report, report_of

STATS_TIMEOUT: Final = 1.0
"""Seconds that the engine has to say how busy it is. Otherwise these figures of the engine are left out."""

Read = Callable[[], float | None]
"""Returns a figure, now; None if it is not known.

Runs on the event loop, which it must not block, and also in the thread of `OtlpMetrics`.
"""


class Gauges(Collector):
    """Figures that are read each time the metrics are collected."""

    def __init__(self) -> None:
        self._reads: list[tuple[type[GaugeMetricFamily | CounterMetricFamily], str, str, Read]] = []

    def gauge(self, name: str, documentation: str, read: Read) -> None:
        """Adds a figure that can rise and fall."""
        self._reads.append((GaugeMetricFamily, name, documentation, read))

    def counter(self, name: str, documentation: str, read: Read) -> None:
        """Adds a figure that never falls. Its name ends with `_total`."""
        self._reads.append((CounterMetricFamily, name, documentation, read))

    def collect(self) -> Iterator[Metric]:
        """Yields the figures that are known now."""
        for make, name, documentation, read in self._reads:
            if (value := read()) is not None:
                yield make(name, documentation, value)

    def add_admission(self, admission: Admission) -> None:
        """Adds the figures of the admission: the slots and the context of the engine, and the queue for them."""
        self.gauge("flywheel_samples_active", "Samples that are admitted to the engine.", lambda: admission.active)
        self.gauge("flywheel_samples_queued", "Samples that wait for admission.", lambda: admission.queued)
        self.gauge("flywheel_max_concurrent", "Samples that are admitted at a time.", lambda: admission.max_concurrent)
        self.gauge("flywheel_max_queued", "Samples that may wait for admission.", lambda: admission.max_queued)
        self.gauge(
            "flywheel_context_tokens_reserved", "Tokens of context that admitted samples hold.", lambda: admission.active_tokens
        )
        self.gauge(
            "flywheel_context_tokens", "Tokens of context that all samples in the engine share.", lambda: admission.max_tokens
        )

        self.gauge(
            "flywheel_context_usage_ratio",
            "Share of that context which admitted samples hold, from 0 to 1.",
            lambda: admission.active_tokens / admission.max_tokens if admission.max_tokens else None,
        )

    def add_log(self) -> None:
        """Adds the figure of the log of this process."""
        self.counter("flywheel_log_lines_dropped_total", "Lines of the log that nobody took in time.", logs.lines_dropped)


class ServerGauges(Gauges):
    """The figures of a server of one process, or of a worker.

    Arguments:
        registry: Gets the figures.
        calls: The records of calls, some of which may not be counted yet.
        generations: The generations.
        supervisor: The supervisor of the engine.
        admission: The admission; None if another process has it.
        get_port: Returns the port that the server listens on; 0 until it listens.
        expiry: When certificates and keys expire.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        calls: Calls,
        generations: Generations,
        supervisor: Supervisor,
        *,
        admission: Admission | None,
        get_port: Callable[[], int],
        expiry: Expiry,
    ) -> None:
        super().__init__()
        self._get_port = get_port
        self._expiry = expiry
        self._registry = registry
        self._calls = calls
        self._generations = generations
        self._supervisor = supervisor
        self._connections = 0
        self._stats: EngineStats | None = None
        self._cached_prompt_tokens: int | None = None
        if admission is not None:
            self.add_admission(admission)
        self.add_log()
        self.gauge("flywheel_connections", "Connections of clients.", lambda: self._connections)
        self._add_generations(generations)
        self._add_engine(supervisor)
        registry.register(self)
        registry.register(expiry)
        registry.register(_BuildInfo(self.model))
        ProcessCollector(registry=registry)

    def _add_generations(self, generations: Generations) -> None:
        self.gauge("flywheel_calls_active", "Calls that the engine works on.", lambda: generations.active)
        self.gauge("flywheel_calls_queued", "Calls that the engine has not started on.", lambda: generations.queued)
        self.counter(
            "flywheel_calls_drained_total",
            "Calls that were ended because they had not finished when the server stopped.",
            lambda: generations.drained,
        )

    def _add_engine(self, supervisor: Supervisor) -> None:
        self.gauge("flywheel_engine_up", "1 if the engine runs, otherwise 0.", lambda: supervisor.is_up)
        self.counter(
            "flywheel_engine_restarts_total",
            "Restarts of the engine after it was found dead.",
            lambda: supervisor.restart_count,
        )
        self.gauge(
            "flywheel_engine_runners",
            "Runners of the engine: containers, or 1 for an engine within the server.",
            lambda: self._stats.num_total_runners if self._stats else None,
        )
        self.gauge(
            "flywheel_engine_backlog",
            "Requests, or parts of requests, that wait in the engine.",
            lambda: self._stats.backlog if self._stats else None,
        )
        self.counter(
            "flywheel_prompt_tokens_cached_total",
            "Tokens of prompts that the engine found in its cache, and did not read again.",
            lambda: self._cached_prompt_tokens,
        )

    def measuring_lag(self) -> AbstractAsyncContextManager[None]:
        """Returns a context in which the lag of the event loop is measured."""
        return loop_lag.measured(self._registry)

    async def registry(self) -> CollectorRegistry:
        """Returns the registry, to be collected on the event loop."""
        return self._registry

    def model(self) -> EngineModel | None:
        """Returns the engine's model; None before the engine has started."""
        return self._generations.last_model

    async def report(self) -> Report:
        """Returns all metrics of now."""
        await self.refresh()
        return await report_of(self._registry)

    async def refresh(self) -> None:
        """Finds out what takes time, and counts all calls that have ended. To be called before the registry is collected.

        Returns soon, whatever the engine does.
        """
        if port := self._get_port():
            # On another thread, because it takes 10 ms for 1000 connections.
            self._connections = await asyncio.to_thread(descriptors.connections, port)
        await asyncio.to_thread(self._expiry.refresh)
        self._stats = await self._current_stats()
        if self._stats is not None:
            self._cached_prompt_tokens = self._stats.cached_prompt_tokens
        self._calls.report()

    async def _current_stats(self) -> EngineStats | None:
        if not self._supervisor.is_up:
            return None
        try:
            async with running_time.timeout(STATS_TIMEOUT):
                return await stats_of(self._generations.engine)
        except Exception:  # noqa: BLE001 - health reports it, and the other figures do not depend on it
            return None


class _BuildInfo(Collector):
    """Says what runs: the version of the server, its engine and its model, once these are known."""

    def __init__(self, get_model: Callable[[], EngineModel | None]) -> None:
        self._get_model = get_model

    def collect(self) -> Iterator[Metric]:
        if model := self._get_model():
            info = GaugeMetricFamily("flywheel_build_info", "What runs.", labels=("version", "engine", "model"))
            info.add_metric((__version__, model.engine, model.name), 1)
            yield info
