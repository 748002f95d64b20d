"""Collects the metrics of all workers, in the parent. Imported only if somebody gets them."""

from collections.abc import Callable, Sequence
from typing import Final

from prometheus_client import ProcessCollector
from prometheus_client.registry import CollectorRegistry

from flywheel_server import running_time
from flywheel_server.admission import Admission
from flywheel_server.gauges import Gauges
from flywheel_server.telemetry.merging import MergedMetrics, report_of
from flywheel_server.workers.process import Worker

REPORT_TIMEOUT: Final = 1.5
"""Seconds that workers have to report their metrics: more than an engine has to say how busy it is. A worker that takes longer
counts as it last reported."""

_PARENT: Final = 0
"""The number of the parent among the processes. Workers stand for themselves."""


class WorkersMetrics:
    """The metrics of all workers and of the parent together.

    Arguments:
        admission: The admission of all workers.
        get_serving: Returns the workers that serve now.
        engine_is_shared: Whether all workers use the same engine, so that what it says of itself counts only once.

    Attributes:
        own: The metrics of the parent alone: the admission of all workers, and its process.
    """

    def __init__(self, admission: Admission, get_serving: Callable[[], Sequence[Worker]], *, engine_is_shared: bool) -> None:
        self._get_serving = get_serving
        shared = ("flywheel_engine_runners", "flywheel_engine_backlog") if engine_is_shared else ()
        self._merged = MergedMetrics(dict.fromkeys(shared, max))
        self.own = CollectorRegistry()
        ProcessCollector(registry=self.own)
        gauges = Gauges()
        gauges.add_admission(admission)
        gauges.add_log()
        gauges.gauge("flywheel_engine_up", "1 if the engine runs, otherwise 0.", lambda: None if get_serving() else 0)
        self.own.register(gauges)

    def retire(self, worker: Worker) -> None:
        """Notes that the worker has ended."""
        self._merged.retire(worker)

    async def refresh(self) -> None:
        """Asks the workers for their metrics, and returns within `REPORT_TIMEOUT` seconds."""
        answers = {worker.metrics.ask(): worker for worker in self._get_serving()}
        if answers:
            await running_time.wait(answers.keys(), REPORT_TIMEOUT)
        for answer, worker in answers.items():
            # A worker that has ended meanwhile is retired already.
            if answer.done() and not answer.cancelled() and not worker.has_closed:
                self._merged.update(worker, answer.result())
            answer.cancel()

    def model(self) -> None:
        """Returns None: only the workers know the model, and report it in `flywheel_build_info`."""

    async def registry(self) -> CollectorRegistry:
        """Returns a registry with the metrics as the workers last reported them, and those of the parent of now."""
        self._merged.update(_PARENT, await report_of(self.own))
        return await self._merged.merged()
