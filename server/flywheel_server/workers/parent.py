"""The parent of the workers: starts them, replaces those that die, and has what holds for all of them together."""

import asyncio
import os
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Final

import structlog

from flywheel_server import running_time
from flywheel_server.admission import Admission
from flywheel_server.admission_control import quotas_for
from flywheel_server.settings import Settings
from flywheel_server.system.output import CLOSE_TIMEOUT, forward
from flywheel_server.workers.port import reserved
from flywheel_server.workers.shared_calls import SharedCalls
from flywheel_server.workers.wire import Connection, Line

log = structlog.stdlib.get_logger(__name__)

END_TIMEOUT: Final = 15.0
"""Seconds that a worker has to end after its drain: what its engine and its connections may take, and a little more."""

COUNT_TIMEOUT: Final = 1.0
"""Seconds that a worker has to tell how many calls it has. One that is stopped does not, and is left out."""

CHECK_INTERVAL: Final = 5.0
"""Seconds between two checks of whether a worker still answers."""

MAX_SILENCE: Final = 30.0
"""Seconds of running time in which a worker that serves must answer; otherwise its event loop hangs, and it is killed."""

STABLE_SECONDS: Final = 10.0
"""Seconds of serving after which the death of a worker counts as the first one in a row."""

MAX_DEATHS: Final = 5
"""Deaths in a row of a worker and of those in its place, with which the server gives up."""

RESTART_DELAY: Final = 0.5
"""Seconds before the place of a worker is filled again after its second death in a row. Each further one doubles them."""


class WorkersError(Exception):
    """The workers do not start, or die again and again."""


class Worker:
    """A process that serves, as the parent sees it.

    Attributes:
        number: Which one it is, from 1. One that replaces another has the same number.
        connection: The parent's end of the pair of sockets.
        ready_at: When it began to serve, in running time; None before that.
        health: Whether it serves, and whether its engine has runners; None before it says so.
        why: Why it cannot serve, if it has said so.
        has_begun: Whether it has taken up the connection, and so can be told to stop.
    """

    def __init__(self, number: int, command: Sequence[str], parent: "Parent", on_output: Callable[[bytes], None]) -> None:
        self.number = number
        self.ready_at: float | None = None
        self.health: tuple[bool, bool] | None = None
        self.why = ""
        self.has_begun = False
        self._parent = parent
        self._closed = asyncio.Event()
        handlers: dict[str, Callable[..., None]] = {
            "hello": self._begin,
            "capacity": parent.admission.set_capacity,
            "health": self._receive_health,
            "ready": self._be_ready,
            "failed": self._fail,
            "total": lambda question: parent.answer_total(self, question),
            "counts": self._receive_counts,
        }
        self.connection = Connection(handlers, self._closed.set)
        self.calls = SharedCalls(parent.quotas, parent.admission, self.connection)
        handlers |= self.calls.handlers
        self._counts: dict[int, asyncio.Future[Line]] = {}
        self._pair, theirs = socket.socketpair()
        reading, writing = os.pipe()
        self._output = threading.Thread(target=forward, args=(reading, on_output), name=f"worker {number}", daemon=True)
        try:
            try:
                self._output.start()
            except RuntimeError:
                os.close(reading)
                raise
            self.process = subprocess.Popen(  # noqa: S603 - this very program
                [*command, str(theirs.fileno()), str(number), *parent.arguments],
                stdin=subprocess.DEVNULL,
                stdout=writing,
                stderr=writing,
                pass_fds=[theirs.fileno()],
            )
        finally:
            theirs.close()
            os.close(writing)

    @property
    def has_closed(self) -> bool:
        """Whether it has closed the connection, as it does when it ends."""
        return self._closed.is_set()

    async def ended(self) -> int:
        """Returns the exit code of the process, or the negative number of the signal that ended it, when it has ended."""
        loop = asyncio.get_running_loop()
        await loop.create_connection(lambda: self.connection, sock=self._pair)
        # Whatever the worker had to say comes before this.
        await self._closed.wait()
        for asked in self._counts.values():
            asked.cancel()
        gone = asyncio.Event()
        handle = os.pidfd_open(self.process.pid)
        try:
            loop.add_reader(handle, gone.set)
            await gone.wait()
            loop.remove_reader(handle)
        finally:
            os.close(handle)
        await loop.run_in_executor(None, self._output.join, CLOSE_TIMEOUT)
        return self.process.wait()

    def stop(self) -> None:
        """Has it drain and end, or end its drain."""
        if self.has_begun:
            self.connection.send("stop")
        else:
            self.process.kill()

    def count(self, question: int) -> asyncio.Future[Line]:
        """Returns what the worker answers when it is asked for its counts."""
        asked = self._counts[question] = asyncio.get_running_loop().create_future()
        self.connection.send("count", question)
        return asked

    def forget(self, question: int) -> None:
        """Takes no answer any more."""
        self._counts.pop(question).cancel()

    def _receive_counts(self, question: int, counts: Line) -> None:
        if (asked := self._counts.get(question)) and not asked.done():
            asked.set_result(counts)

    def _receive_health(self, serving: bool, runners: bool) -> None:
        self.health = (serving, runners)
        self._parent.publish_health()

    def _begin(self) -> None:
        self.has_begun = True
        self._parent.on_begun(self)

    def _be_ready(self) -> None:
        self.ready_at = running_time.now()
        self._parent.on_ready()

    def _fail(self, why: str) -> None:
        self.why = why


class Parent:
    """Keeps the workers running.

    Arguments:
        settings: Those of the server.
        arguments: What each worker gets after its descriptor and its number: the port and the flags of the settings.
        on_output: Gets what the workers write to standard error, and must not wait.

    Attributes:
        admission: The admission of all workers.
        quotas: The quotas of all workers.
    """

    def __init__(self, settings: Settings, arguments: Sequence[str], on_output: Callable[[bytes], None]) -> None:
        self.admission = Admission(settings.max_concurrent, settings.max_queued, running_time.clock().time)
        self.quotas = quotas_for(self.admission)
        self.arguments = arguments
        self._settings = settings
        self._on_output = on_output
        self._workers: dict[int, Worker] = {}
        self._health = (False, False)
        self._up = asyncio.Event()
        self._stopping = asyncio.Event()
        self._questions = 0
        self._asking: list[tuple[Worker, int]] = []
        """The questions for the counts of all workers that wait, and who has asked them."""
        self._answering: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Has the workers serve for the length of the context, which is cancelled if they die again and again.

        It is entered when all of them serve. On leaving, they drain; cancelling that ends the drain.

        Raises:
            WorkersError: One of them does not start, or one died too often.
        """
        keeping = [asyncio.create_task(self._keep(number)) for number in range(1, self._settings.workers + 1)]
        failing = asyncio.gather(*keeping)
        failing.add_done_callback(lambda _: self._up.set())
        body = asyncio.current_task()

        def interrupt(_: asyncio.Future[list[None]]) -> None:
            if body:
                body.cancel()

        try:
            await self._up.wait()
            if not failing.done():
                # What a worker is told comes to it in order: one that has answered has heard that all serve.
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
            await self._stop(keeping)
            if error := failing.exception():
                raise error

    async def _keep(self, number: int) -> None:
        """Has a worker of this number run until the server stops."""
        deaths = 0
        while True:
            was_stable, why = await self._run_one(number)
            if self._stopping.is_set():
                return
            if not self._up.is_set():
                raise WorkersError(why)
            deaths = 1 if was_stable else deaths + 1
            if deaths == MAX_DEATHS:
                raise WorkersError(f"a worker has died {deaths} times in a row: {why}")
            await self._pause(RESTART_DELAY * 2 ** (deaths - 2) if deaths > 1 else 0)
            if self._stopping.is_set():
                return

    async def _run_one(self, number: int) -> tuple[bool, str]:
        """Runs a worker until it has ended, and returns whether it had served for a while, and why it has ended."""
        try:
            worker = self._workers[number] = Worker(number, WORKER_COMMAND, self, self._on_output)
        except (OSError, RuntimeError) as error:
            # Processes, threads, memory or descriptors are short. They may be there again when the next worker is started.
            log.error("worker not started", number=number, error=str(error))  # noqa: TRY400 - the message says it
            return False, f"worker {number} cannot be started: {error}"
        log.info("worker started", number=number, pid=worker.process.pid)
        checking = asyncio.create_task(self._kill_if_silent(worker))
        exit_code = await worker.ended()
        checking.cancel()
        del self._workers[number]
        worker.calls.give_back_all()
        self.publish_health()
        why = worker.why or f"worker {number} ended with {exit_code}"
        if self._up.is_set() and not self._stopping.is_set():
            log.error("worker died", number=number, pid=worker.process.pid, exit_code=exit_code, why=why)
        was_stable = worker.ready_at is not None and running_time.now() - worker.ready_at >= STABLE_SECONDS
        return was_stable, why

    async def _kill_if_silent(self, worker: Worker) -> None:
        """Kills a worker that serves but does not answer any more: its callers would wait for ever."""
        while not worker.has_closed:
            await running_time.sleep(CHECK_INTERVAL)
            if worker.ready_at is not None and not await self._ask([worker], MAX_SILENCE) and not worker.has_closed:
                log.error("worker hangs", number=worker.number, pid=worker.process.pid, seconds=MAX_SILENCE)
                worker.process.kill()
                return

    async def _pause(self, seconds: float) -> None:
        """Returns after so many seconds, or when the server stops."""
        with suppress(TimeoutError):
            async with running_time.timeout(seconds):
                await self._stopping.wait()

    async def _stop(self, keeping: Sequence[asyncio.Task[None]]) -> None:
        self._stopping.set()
        try:
            drain = self._settings.withdraw_window + self._settings.drain_timeout
            await self._end_workers(keeping, drain + END_TIMEOUT)
        except asyncio.CancelledError:
            await self._end_workers(keeping, END_TIMEOUT)
            raise
        finally:
            for worker in self._workers.values():
                worker.process.kill()
            await asyncio.wait(keeping)

    async def _end_workers(self, keeping: Sequence[asyncio.Task[None]], timeout: float) -> None:  # noqa: ASYNC109 - of others
        for worker in self._workers.values():
            worker.stop()
        await running_time.wait(keeping, timeout)

    def on_begun(self, worker: Worker) -> None:
        """Tells a worker that has taken up its connection how the server is."""
        worker.connection.send("health", *self._health)

    def on_ready(self) -> None:
        """Takes note that a worker serves; says so for the server once all of them do."""
        if len(self._workers) == self._settings.workers and all(
            worker.ready_at is not None for worker in self._workers.values()
        ):
            self._up.set()
            self.publish_health()

    def publish_health(self) -> None:
        """Tells all workers how they are together: they serve if each of them does that is there.

        At the start all have to be there. Later a worker that is being replaced does not count, because it gets no calls.
        """
        known = [worker.health for worker in self._workers.values() if worker.health]
        serving = self._up.is_set() and bool(known) and all(serving for serving, _ in known)
        health = (serving, serving and any(runners for _, runners in known))
        if health != self._health:
            self._health = health
            for worker in self._workers.values():
                worker.connection.send("health", *health)

    def answer_total(self, asking: Worker, question: int) -> None:
        """Sends a worker the counts of all workers, now or with the next ones if some are being collected."""
        self._asking.append((asking, question))
        if self._answering is None or self._answering.done():
            self._answering = asyncio.create_task(self._answer_totals())

    async def _answer_totals(self) -> None:
        while self._asking:
            asking, self._asking = self._asking, []
            counts = await self._count_all()
            for worker, question in asking:
                worker.connection.send("total", question, counts)

    async def _count_all(self) -> Line:
        """Returns the sums of what the workers answer when they are asked for their counts."""
        serving = [worker for worker in self._workers.values() if worker.ready_at is not None]
        answers = await self._ask(serving, COUNT_TIMEOUT)
        return [sum(column) for column in zip(*answers, strict=True)] or [0, 0, 0, 0]

    async def _ask(self, workers: Sequence[Worker], timeout: float) -> list[Line]:  # noqa: ASYNC109 - of others
        """Returns the counts of those workers that tell them within so many seconds."""
        self._questions += 1
        question = self._questions
        asked = [worker.count(question) for worker in workers]
        if asked:
            await running_time.wait(asked, timeout)
        for worker in workers:
            worker.forget(question)
        return [each.result() for each in asked if not each.cancelled()]


# -P keeps the folder in which the server is started from what can be imported, as with the command itself.
WORKER_COMMAND: Final = (sys.executable, "-P", "-m", "flywheel_server.worker")


@asynccontextmanager
async def serve_in_workers(
    settings: Settings, arguments: Sequence[str], on_output: Callable[[bytes], None]
) -> AsyncIterator[int]:
    """Has `settings.workers` processes serve for the length of the context, which gets the port that they listen on.

    On leaving, it stops them as `server.serve` stops.

    Arguments:
        settings: The settings.
        arguments: The command line that the settings come from, besides the environment.
        on_output: Gets the lines that the workers write to standard error. It must not wait.

    Raises:
        OSError: The port is taken, or a worker cannot be started.
        WorkersError: The workers do not start, or die again and again. This cancels the context.
    """
    host = settings.address.rpartition(":")[0]
    with reserved(host, settings.port) as port:
        async with Parent(settings, [str(port), *arguments], on_output).running():
            yield port
