"""Reads figures of the server when its metrics are collected: gauges, and counters that the server keeps anyway.

`flywheel_server` has what is read. Protocols name it here, because telemetry knows nothing of generations.
"""

from collections.abc import Awaitable, Callable, Iterator
from typing import Final, Protocol

from flywheel_proto import __version__
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from flywheel_server import logs, running_time
from flywheel_server.system import descriptors

STATS_TIMEOUT: Final = 1.0
"""Seconds that the engine has to say how busy it is. Otherwise its figures are left out."""

Read = Callable[[], float | None]
"""Returns a figure, now; None if it is not known. Runs on any thread."""


class Gauges(Collector):
    """Figures that are read each time the metrics are collected."""

    def __init__(self) -> None:
        self._reads: list[tuple[type[GaugeMetricFamily | CounterMetricFamily], str, str, Read]] = []

    def gauge(self, name: str, documentation: str, read: Read) -> None:
        """Adds a figure that can rise and fall."""
        self._reads.append((GaugeMetricFamily, name, documentation, read))

    def counter(self, name: str, documentation: str, read: Read) -> None:
        """Adds a figure that never falls. Its `name` ends with `_total`."""
        self._reads.append((CounterMetricFamily, name, documentation, read))

    def collect(self) -> Iterator[Metric]:
        """Yields the figures that are known now."""
        for make, name, documentation, read in self._reads:
            if (value := read()) is not None:
                yield make(name, documentation, value)


class AdmissionFigures(Protocol):
    """What is read of `flywheel_server.admission.Admission`."""

    active: int
    queued: int
    max_concurrent: int
    max_queued: int
    active_tokens: int
    max_tokens: int | None


def add_admission(gauges: Gauges, admission: AdmissionFigures) -> None:
    """Adds the figures of the admission: slots of the engine and the queue for them."""
    gauges.gauge("flywheel_samples_active", "Samples that are admitted to the engine.", lambda: admission.active)
    gauges.gauge("flywheel_samples_queued", "Samples that wait for admission.", lambda: admission.queued)
    gauges.gauge("flywheel_max_concurrent", "Samples that are admitted at a time.", lambda: admission.max_concurrent)
    gauges.gauge("flywheel_max_queued", "Samples that may wait for admission.", lambda: admission.max_queued)
    gauges.gauge(
        "flywheel_context_tokens_reserved", "Tokens of context that admitted samples hold.", lambda: admission.active_tokens
    )
    gauges.gauge(
        "flywheel_context_tokens", "Tokens of context that all samples in the engine share.", lambda: admission.max_tokens
    )


class GenerationFigures(Protocol):
    """What is read of `flywheel_server.generations.Generations`."""

    active: int
    queued: int
    drained: int


def add_generations(gauges: Gauges, generations: GenerationFigures) -> None:
    """Adds the figures of the generations."""
    gauges.gauge("flywheel_calls_active", "Calls that the engine works on.", lambda: generations.active)
    gauges.gauge("flywheel_calls_queued", "Calls that the engine has not started on.", lambda: generations.queued)
    gauges.counter(
        "flywheel_calls_drained_total",
        "Calls that were ended because they had not finished when the server stopped.",
        lambda: generations.drained,
    )


def add_process(gauges: Gauges, get_port: Callable[[], int]) -> None:
    """Adds the figures of this process. `get_port` returns the port that it listens on; 0 if it does not listen yet."""
    gauges.gauge(
        "flywheel_connections",
        "Connections of clients.",
        lambda: descriptors.connections(port) if (port := get_port()) else 0,
    )
    add_log(gauges)


def add_log(gauges: Gauges) -> None:
    """Adds the figures of the log of this process."""
    gauges.counter("flywheel_log_lines_dropped_total", "Lines of the log that nobody took in time.", logs.lines_dropped)


class SupervisorFigures(Protocol):
    """What is read of `flywheel_server.supervision.Supervisor`."""

    is_up: bool
    restart_count: int


class Stats(Protocol):
    """What is read of `flywheel_server.engines.base.EngineStats`."""

    @property
    def backlog(self) -> int:
        """See `EngineStats`."""

    @property
    def num_total_runners(self) -> int:
        """See `EngineStats`."""

    @property
    def cached_prompt_tokens(self) -> int | None:
        """See `EngineStats`."""


class EngineGauges:
    """The figures of the engine. `refresh` asks the engine, which may be on other machines, before they are collected.

    Arguments:
        gauges: Gets the figures.
        supervisor: Knows whether the engine runs.
        get_stats: Asks the engine how busy it is.
    """

    def __init__(self, gauges: Gauges, supervisor: SupervisorFigures, get_stats: Callable[[], Awaitable[Stats]]) -> None:
        self._supervisor = supervisor
        self._get_stats = get_stats
        self._stats: Stats | None = None
        self._cached_prompt_tokens: int | None = None
        gauges.gauge("flywheel_engine_up", "1 if the engine runs, otherwise 0.", lambda: supervisor.is_up)
        gauges.counter(
            "flywheel_engine_restarts_total",
            "Starts of the engine after it was found dead.",
            lambda: supervisor.restart_count,
        )
        gauges.gauge(
            "flywheel_engine_runners",
            "Runners of the engine: containers, or 1 within the server.",
            lambda: stats.num_total_runners if (stats := self._stats) else None,
        )
        gauges.gauge(
            "flywheel_engine_backlog",
            "Requests, or parts of them, that wait in the engine.",
            lambda: stats.backlog if (stats := self._stats) else None,
        )
        gauges.counter(
            "flywheel_prompt_tokens_cached_total",
            "Tokens of prompts that the engine found in its cache, and did not read again.",
            lambda: self._cached_prompt_tokens,
        )

    async def refresh(self) -> None:
        """Asks the engine for its statistics, and returns within `STATS_TIMEOUT` seconds."""
        self._stats = await self._current_stats()
        if self._stats is not None:
            self._cached_prompt_tokens = self._stats.cached_prompt_tokens

    async def _current_stats(self) -> Stats | None:
        if not self._supervisor.is_up:
            return None
        try:
            async with running_time.timeout(STATS_TIMEOUT):
                return await self._get_stats()
        except Exception:  # noqa: BLE001 - health reports it; the other metrics do not depend on it
            return None


class Model(Protocol):
    """What is read of `flywheel_server.engines.base.EngineModel`."""

    @property
    def name(self) -> str:
        """See `EngineModel`."""

    @property
    def engine(self) -> str:
        """See `EngineModel`."""


class BuildInfo(Collector):
    """Says what runs: the version of the server, its engine and its model, once these are known."""

    def __init__(self, get_model: Callable[[], Model | None]) -> None:
        self._get_model = get_model

    def collect(self) -> Iterator[Metric]:
        """Yields one metric, whose value is always 1."""
        if model := self._get_model():
            info = GaugeMetricFamily("flywheel_build_info", "What runs.", labels=("version", "engine", "model"))
            info.add_metric((__version__, model.engine, model.name), 1)
            yield info
