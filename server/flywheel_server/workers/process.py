"""Runs one worker process, and keeps what it reports, in the parent."""

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Final

from flywheel_server import running_time
from flywheel_server.system.output import CLOSE_TIMEOUT, forward, start_owner
from flywheel_server.workers.wire import Connection, Questions

# -P keeps the current folder out of sys.path, as with the command flywheel-server.
COMMAND: Final = (sys.executable, "-P", "-m", "flywheel_server.worker")


class Worker:
    """A worker process.

    Arguments:
        number: The number of the worker, from 1. A replacement has the number of the worker that it replaces.
        arguments: The arguments after the descriptor of the worker's socket and its number.
        on_change: Called when the worker has connected, has begun to serve, or has reported its health.
        on_output: Receives what the worker writes to standard output and standard error. It must not block.

    Attributes:
        number: As given.
        process: The process.
        connection: The parent's end of the socket pair, which is connected by `wait`.
        counts: Asks the worker for its counts. Unanswered questions are cancelled when the worker ends.
        metrics: Asks the worker for its metrics, likewise.
        handlers: The functions to call for messages of the worker. Others may be added before `wait`.
        ready_at: When the worker began to serve, in running time; None before that.
        health: Whether the worker serves, and whether its engine has runners; None before its first report.
        why: Why the worker cannot serve; empty if it has not reported a reason.
    """

    def __init__(
        self, number: int, arguments: Sequence[str], on_change: Callable[[], None], on_output: Callable[[bytes], None]
    ) -> None:
        self.number = number
        self.ready_at: float | None = None
        self.health: tuple[bool, bool] | None = None
        self.why = ""
        self.handlers: dict[str, Callable[..., None]] = {
            "hello": self._on_hello,
            "health": self._receive_health,
            "ready": self._on_ready,
            "failed": self._on_failed,
        }
        self._on_change = on_change
        self._has_connected = False
        """Whether the worker uses the connection, so that it can be told to stop."""
        self._shown_health: tuple[bool, bool] | None = None
        self._closed = asyncio.Event()
        self.connection = Connection(self.handlers, self._closed.set)
        self.counts = Questions(self.connection, "count")
        self.metrics = Questions(self.connection, "metrics")
        self.handlers |= {"counts": self.counts.receive, "report": self.metrics.receive}
        self._socket, worker_socket = socket.socketpair()
        reading, writing = os.pipe()
        try:
            self._output = start_owner(reading, lambda: forward(reading, on_output), f"worker {number}")
            self.process = subprocess.Popen(  # noqa: S603 - this very program
                [*COMMAND, str(worker_socket.fileno()), str(number), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=writing,
                stderr=writing,
                pass_fds=[worker_socket.fileno()],
            )
        finally:
            worker_socket.close()
            os.close(writing)

    @property
    def has_closed(self) -> bool:
        """Whether the connection is closed, as it is when the worker ends."""
        return self._closed.is_set()

    async def wait(self) -> int:
        """Waits for the end of the process, and returns its exit code, or the negative number of the signal that ended it."""
        loop = asyncio.get_running_loop()
        await loop.create_connection(lambda: self.connection, sock=self._socket)
        # All messages of the worker arrive before this.
        await self._closed.wait()
        for answer in (*self.counts.unanswered(), *self.metrics.unanswered()):
            answer.cancel()
        has_exited = asyncio.Event()
        handle = os.pidfd_open(self.process.pid)
        try:
            loop.add_reader(handle, has_exited.set)
            await has_exited.wait()
            loop.remove_reader(handle)
        finally:
            os.close(handle)
        await loop.run_in_executor(None, self._output.join, CLOSE_TIMEOUT)
        return self.process.wait()

    def stop(self) -> None:
        """Makes the worker drain and end. A second call ends the drain."""
        if self._has_connected:
            self.connection.send("stop")
        else:
            self.process.kill()

    def show(self, health: tuple[bool, bool]) -> None:
        """Tells the worker the health of all workers, unless it knows. Does nothing before the worker has connected."""
        if self._has_connected and health != self._shown_health:
            self._shown_health = health
            self.connection.send("health", *health)

    def _on_hello(self) -> None:
        self._has_connected = True
        self._on_change()

    def _receive_health(self, serving: bool, runners: bool) -> None:
        self.health = (serving, runners)
        self._on_change()

    def _on_ready(self) -> None:
        self.ready_at = running_time.now()
        self._on_change()

    def _on_failed(self, why: str) -> None:
        self.why = why
