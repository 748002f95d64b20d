"""Starts, replaces and stops the workers, and keeps their common admission, quotas and health."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Final

import structlog

from flywheel_server import running_time
from flywheel_server.admission import Admission
from flywheel_server.admission_control import quotas_for
from flywheel_server.metrics_endpoint import check_metrics, serving_metrics
from flywheel_server.settings import Settings
from flywheel_server.telemetry.otlp_factory import create_otlp
from flywheel_server.workers.port import reserved
from flywheel_server.workers.process import Worker
from flywheel_server.workers.shared_calls import SharedCalls
from flywheel_server.workers.wire import Line

if TYPE_CHECKING:
    from flywheel_server.workers.metrics import WorkersMetrics

log = structlog.stdlib.get_logger(__name__)

END_TIMEOUT: Final = 15.0
"""Seconds that a worker has to end after its drain: its engine and its connections take less."""

COUNT_TIMEOUT: Final = 1.0
"""Seconds that a worker has to answer with its counts. A worker that does not answer is left out."""

CHECK_INTERVAL: Final = 5.0
"""Seconds between two checks of whether a worker answers."""

MAX_SILENCE: Final = 30.0
"""Seconds of running time within which a serving worker must answer a check. Otherwise its event loop hangs: it is killed."""

STABLE_SECONDS: Final = 10.0
"""Seconds of serving after which a worker counts as stable: if it dies then, the count of deaths in a row starts again."""

MAX_DEATHS: Final = 5
"""Deaths in a row of a worker and its replacements after which the server gives up."""

RESTART_DELAY: Final = 0.5
"""Seconds before a worker is replaced after its second death in a row. Each further death doubles them."""


class WorkersError(Exception):
    """A worker does not start, or has died too often."""


class Parent:
    """Keeps the workers running. Its arguments are as in `serve_in_workers`, but `arguments` begins with the port."""

    def __init__(self, settings: Settings, arguments: Sequence[str], on_output: Callable[[bytes], None]) -> None:
        self._admission = Admission(settings.max_concurrent, settings.max_queued)
        self._quotas = quotas_for(self._admission)
        self._arguments = arguments
        self._settings = settings
        self._on_output = on_output
        self._workers: dict[int, Worker] = {}
        self._is_debug = False
        self._is_up = asyncio.Event()
        self._stopping = asyncio.Event()
        self._waiting_questions: list[tuple[Worker, int]] = []
        """Waiting questions for the counts of all workers, each with the worker that asks."""
        self._answering: asyncio.Task[None] | None = None
        self._metrics = self._create_metrics() if settings.metrics_address or settings.otlp_endpoint else None

    def _create_metrics(self) -> "WorkersMetrics":
        from flywheel_server.workers.metrics import WorkersMetrics

        engine_is_shared = not self._settings.engine_is_in_process
        return WorkersMetrics(self._admission, self._serving, engine_is_shared=engine_is_shared)

    @asynccontextmanager
    async def reporting(self) -> AsyncIterator[None]:
        """Serves the metrics of all workers for the length of the context, and sends those of the parent, if anybody gets them.

        Over OTLP, each worker sends its own metrics.
        """
        async with AsyncExitStack() as stack:
            if self._metrics and self._settings.metrics_address is not None:
                await stack.enter_async_context(serving_metrics(self._settings, self._metrics))
            if self._metrics and self._settings.otlp_endpoint is not None:
                otlp = create_otlp(self._settings.otlp_endpoint, is_one_of_several=True)
                stack.push_async_callback(otlp.stop)
                otlp.push_metrics(self._metrics.own)
            yield

    def _serving(self) -> list[Worker]:
        """Returns the workers that serve now."""
        return [worker for worker in self._workers.values() if worker.ready_at is not None]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Runs the workers for the length of the context, which starts when all of them serve.

        On leaving the context, the workers drain; cancelling that ends the drain. Raises the `WorkersError` of
        `serve_in_workers`, and cancels the context for it.
        """
        keepers = [asyncio.create_task(self._keep_running(number)) for number in range(1, self._settings.workers + 1)]
        failing = asyncio.gather(*keepers)
        failing.add_done_callback(lambda _: self._is_up.set())
        body = asyncio.current_task()

        def interrupt(_: asyncio.Future[list[None]]) -> None:
            if body:
                body.cancel()

        try:
            await self._is_up.wait()
            if not failing.done():
                # Messages arrive in order: a worker that answers this has received the message that all workers serve.
                await self._count_all()
                failing.add_done_callback(interrupt)
                yield
        except asyncio.CancelledError:
            if failing.done() and body:
                body.uncancel()
            else:
                raise
        finally:
            failing.remove_done_callback(interrupt)
            await self._stop(keepers)
            if error := failing.exception():
                raise error

    async def _keep_running(self, number: int) -> None:
        """Runs a worker with this number, and its replacements, until the server stops."""
        deaths = 0
        while not self._stopping.is_set():
            was_stable, why = await self._run_one(number)
            if self._stopping.is_set():
                return
            if not self._is_up.is_set():
                raise WorkersError(why)
            deaths = 1 if was_stable else deaths + 1
            if deaths == MAX_DEATHS:
                raise WorkersError(f"a worker has died {deaths} times in a row: {why}")
            with suppress(TimeoutError):
                async with running_time.timeout(RESTART_DELAY * 2 ** (deaths - 2) if deaths > 1 else 0):
                    await self._stopping.wait()

    async def _run_one(self, number: int) -> tuple[bool, str]:
        """Runs a worker until it ends. Returns whether it was stable, and why it has ended."""
        try:
            worker = self._workers[number] = Worker(number, self._arguments, self._update_workers, self._on_output)
        except (OSError, RuntimeError) as error:
            # Processes, threads, memory or descriptors are exhausted, perhaps only for a while.
            log.error("worker not started", number=number, error=str(error))  # noqa: TRY400 - the message says it
            return False, f"worker {number} cannot be started: {error}"
        log.info("worker started", number=number, pid=worker.process.pid)
        calls = SharedCalls(self._quotas, self._admission, worker.connection)
        worker.handlers |= {
            **calls.handlers,
            "capacity": self._admission.set_capacity,
            "total": partial(self._receive_total, worker),
        }
        checking = asyncio.create_task(self._kill_if_silent(worker))
        exit_code = await worker.wait()
        checking.cancel()
        del self._workers[number]
        calls.release_all()
        if self._metrics:
            self._metrics.retire(worker)
        self._update_health()
        why = worker.why or f"worker {number} ended with {exit_code}"
        if self._is_up.is_set() and not self._stopping.is_set():
            log.error("worker died", number=number, pid=worker.process.pid, exit_code=exit_code, why=why)
        was_stable = worker.ready_at is not None and running_time.now() - worker.ready_at >= STABLE_SECONDS
        return was_stable, why

    async def _kill_if_silent(self, worker: Worker) -> None:
        """Kills a serving worker that stops answering, because its callers would wait for ever."""
        while not worker.has_closed:
            await running_time.sleep(CHECK_INTERVAL)
            if worker.ready_at is not None and not await self._ask([worker], MAX_SILENCE) and not worker.has_closed:
                log.error("worker hangs", number=worker.number, pid=worker.process.pid, seconds=MAX_SILENCE)
                worker.process.kill()
                return

    async def _stop(self, keepers: Sequence[asyncio.Task[None]]) -> None:
        self._stopping.set()
        try:
            drain = self._settings.withdraw_window + self._settings.drain_timeout
            await self._end_workers(keepers, drain + END_TIMEOUT)
        except asyncio.CancelledError:
            await self._end_workers(keepers, END_TIMEOUT)
            raise
        finally:
            for worker in self._workers.values():
                worker.process.kill()
            await asyncio.wait(keepers)

    async def _end_workers(self, keepers: Sequence[asyncio.Task[None]], timeout: float) -> None:  # noqa: ASYNC109 - for the workers, not for this call
        for worker in self._workers.values():
            worker.stop()
        await running_time.wait(keepers, timeout)

    def set_debug(self, on: bool) -> None:
        """Makes all workers log debug, or stop that."""
        self._is_debug = on
        self._update_workers()

    def _update_workers(self) -> None:
        """Tells each worker what it does not know yet: whether to log debug, and the common health."""
        for worker in self._workers.values():
            worker.set_debug(self._is_debug)
        self._update_health()

    def _update_health(self) -> None:
        """Shows all workers the common health: serving if every worker that runs serves.

        At the start, all workers must run. Later a worker that is being replaced does not count, because it gets no calls.
        """
        workers = self._workers.values()
        if len(workers) == self._settings.workers and all(worker.ready_at is not None for worker in workers):
            self._is_up.set()
        known = [worker.health for worker in workers if worker.health]
        serving = self._is_up.is_set() and bool(known) and all(serving for serving, _ in known)
        health = (serving, serving and any(runners for _, runners in known))
        for worker in workers:
            worker.show(health)

    def _receive_total(self, asking: Worker, question: int) -> None:
        """Sends a worker the counts of all workers. If counts are being collected, the question waits for the next ones."""
        self._waiting_questions.append((asking, question))
        if self._answering is None or self._answering.done():
            self._answering = asyncio.create_task(self._answer_totals())

    async def _answer_totals(self) -> None:
        while self._waiting_questions:
            asking, self._waiting_questions = self._waiting_questions, []
            counts = await self._count_all()
            for worker, question in asking:
                worker.connection.send("total", question, counts)

    async def _count_all(self) -> Line:
        """Returns the sums of the counts of all serving workers."""
        answers = await self._ask(self._serving(), COUNT_TIMEOUT)
        return [sum(column) for column in zip(*answers, strict=True)] or [0, 0, 0, 0]

    async def _ask(self, workers: Sequence[Worker], timeout: float) -> list[Line]:  # noqa: ASYNC109 - for the workers, not for this call
        """Returns the counts of the workers that answer within `timeout` seconds."""
        answers = [worker.counts.ask() for worker in workers]
        if answers:
            await running_time.wait(answers, timeout)
        for answer in answers:
            answer.cancel()
        return [answer.result() for answer in answers if not answer.cancelled()]


@asynccontextmanager
async def serve_in_workers(
    settings: Settings,
    arguments: Sequence[str],
    on_output: Callable[[bytes], None],
    switching_debug: Callable[[Callable[[bool], object]], AbstractContextManager[None]],
) -> AsyncIterator[int]:
    """Serves in `settings.workers` processes for the length of the context, and gives the port that they listen on.

    On leaving the context, the workers stop as `server.serve` does.

    Arguments:
        settings: The settings of the server.
        arguments: The command line from which the settings come, in addition to the environment.
        on_output: Receives what the workers write to standard output and standard error. It must not block.
        switching_debug: Returns a context within which a function is told, on any thread, whether debug is on; see
            `SignalReceiver.switching_debug`.

    Raises:
        OSError: The port, or that of the metrics, is taken, or the host is not an address of this machine.
        ValueError: The settings do not fit together.
        WorkersError: A worker does not start, or has died too often. The latter cancels the context.
    """
    host = settings.address.rpartition(":")[0]
    check_metrics(settings)
    with reserved(host, settings.port) as port:
        parent = Parent(settings, [str(port), *arguments], on_output)
        loop = asyncio.get_running_loop()
        with switching_debug(lambda on: loop.call_soon_threadsafe(parent.set_debug, on)):
            async with parent.reporting(), parent.running():
                yield port
