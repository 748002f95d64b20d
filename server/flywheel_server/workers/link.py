"""Connects a worker to the parent, which has the admission, the health and the counts of all workers."""

import asyncio
import os
import select
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Final, Self

from flywheel_server import logs
from flywheel_server.activity import stats_of
from flywheel_server.engines.base import EngineStats, EngineUnavailableError
from flywheel_server.generations import Counts, Generations, GetCounts
from flywheel_server.health import Health
from flywheel_server.workers.shared_admission import SharedAdmissionControl
from flywheel_server.workers.wire import Connection, Line, Questions

SECOND_STOP_DELAY: Final = 0.05
"""Seconds between the two stops of a worker whose parent is gone: two at once would cancel its task only once."""

ORPHAN_TIMEOUT: Final = 15.0
"""Seconds that a worker has to end after its parent is gone. Then it exits, even if its event loop hangs."""


class Link:
    """A worker's connection to the parent.

    Attributes:
        admission: An admission control that all workers share.
        health: The health of all workers together.
    """

    def __init__(self) -> None:
        self.health = Health(self._report)
        handlers: dict[str, Callable[..., None]] = {
            "health": self._receive_health,
            "count": self._receive_count,
            "debug": logs.set_debug,
            "metrics": self._receive_metrics,
            "stop": self._stop,
        }
        self._connection = Connection(handlers, self._on_parent_gone)
        self.admission = SharedAdmissionControl(self._connection)
        self._totals = Questions(self._connection, "total")
        handlers |= {"admitted": self.admission.admit, "refused": self.admission.refuse, "total": self._totals.receive}
        self._own_counts: Callable[[], Awaitable[Line]] | None = None
        self._own_metrics: Callable[[], Awaitable[Line]] | None = None
        self._answering: set[asyncio.Task[None]] = set()
        self._serves = False
        self._overall = (False, False)
        self._stops = 0
        self._on_stop: Callable[[], None] | None = None

    @classmethod
    async def over(cls, pair: socket.socket) -> Self:
        """Connects over one end of a socket pair, and returns the link."""
        link = cls()
        descriptor = os.dup(pair.fileno())
        threading.Thread(target=_exit_after_parent, args=(descriptor,), name="parent", daemon=True).start()
        await asyncio.get_running_loop().create_connection(lambda: link._connection, sock=pair)
        link._connection.send("hello")
        return link

    def counting(self, generations: Generations, *, in_process: bool) -> GetCounts:
        """Returns a function that counts the calls of all workers.

        Arguments:
            generations: The calls of this worker.
            in_process: Whether each worker runs an engine of its own, whose statistics are added up. An engine elsewhere is
                the same for all workers.
        """
        engine = generations.engine

        async def count_own() -> Line:
            stats = await stats_of(engine) if in_process else EngineStats(0, 0)
            return (generations.active, generations.queued, stats.backlog, stats.num_total_runners)

        async def count_all() -> Counts:
            stats = await stats_of(engine)
            active, queued, backlog, runners = await self._totals.ask()
            return Counts(active, queued, EngineStats(backlog, runners) if in_process else stats)

        self._own_counts = count_own
        return count_all

    def report_metrics(self, get_report: Callable[[], Awaitable[Line]]) -> None:
        """Reports the metrics of this worker whenever the parent asks. `get_report` returns a `telemetry.merging.Report`."""
        self._own_metrics = get_report

    @contextmanager
    def calling(self, act: Callable[[], None]) -> Iterator[None]:
        """Calls `act` each time the parent stops the worker, during the context, and once for each earlier stop.

        If the parent is gone, calls `act` twice, so that the worker does not drain.
        """
        self._on_stop = act
        for _ in range(self._stops):
            act()
        try:
            yield
        finally:
            self._on_stop = None

    def ready(self) -> None:
        """Tells the parent that the worker has begun to serve."""
        self._connection.send("ready")

    async def fail(self, why: str) -> None:
        """Tells the parent why the worker cannot serve, and returns after that has been sent."""
        self._connection.send("failed", why)
        await self._connection.close()

    def _receive_health(self, serving: bool, runners: bool) -> None:
        self._overall = (serving, runners)
        self._show()

    def _receive_count(self, question: int) -> None:
        self._answer("counts", question, self._own_counts)

    def _receive_metrics(self, question: int) -> None:
        self._answer("report", question, self._own_metrics)

    def _answer(self, kind: str, question: int, get_figures: Callable[[], Awaitable[Line]] | None) -> None:
        async def answer() -> None:
            if get_figures:
                self._connection.send(kind, question, await get_figures())

        # The parent asks only workers that serve, and so have figures.
        answering = asyncio.create_task(answer())
        self._answering.add(answering)
        answering.add_done_callback(self._answering.discard)

    def _stop(self) -> None:
        self._stops += 1
        if self._on_stop:
            self._on_stop()

    def _on_parent_gone(self) -> None:
        self.admission.end(_parent_gone)
        for answer in self._totals.unanswered():
            answer.set_exception(_parent_gone())
        self._stop()
        asyncio.get_running_loop().call_later(SECOND_STOP_DELAY, self._stop)

    def _report(self, *, serving: bool, runners: bool) -> None:
        self._serves = serving
        self._connection.send("health", serving, runners)
        self._show()

    def _show(self) -> None:
        """Shows the health of all workers, but never serving if this worker does not serve."""
        serving, runners = self._overall
        self.health.show(serving=serving and self._serves, runners=runners and self._serves)


def _parent_gone() -> EngineUnavailableError:
    return EngineUnavailableError("the parent of this worker is gone")


def _exit_after_parent(descriptor: int) -> None:
    """Exits `ORPHAN_TIMEOUT` after the parent has closed its end of the socket pair. Runs on a thread of its own."""
    poller = select.poll()
    # Without events to watch, only POLLHUP is reported.
    poller.register(descriptor, 0)
    poller.poll()
    time.sleep(ORPHAN_TIMEOUT)
    os._exit(1)
