"""A container: a process of Modal's entry point."""

import asyncio
import codecs
import concurrent.futures
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from modal_proto import api_pb2

from tests.modal_cloud.state import Call, Changes, Function, new_id

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

GRACE = 30.0  # seconds that a container has to end itself, on Modal


class Container:
    """A process of Modal's container entry point."""

    def __init__(self, function: Function, root: Path) -> None:
        self.task_id = new_id("ta")
        self.function = function
        self.definition = function.definition
        self.version = function.app.version
        self.started = time.time()
        self.root = root / self.task_id
        self.process: subprocess.Popen[bytes]
        self.ready = False
        self.draining = False
        """It takes no more inputs."""
        self.ending = False
        """It has been sent a signal to end."""
        self.stopping = False
        """It has been told to end, and is not to be replaced."""
        self.inputs: dict[str, Call] = {}
        self.to_cancel: set[str] = set()
        self.failure: api_pb2.GenericResult | None = None
        """The error with which the container could not start."""
        self.changes = Changes()
        self.at_exit: list[Callable[[], None]] = []
        self._printed = ""
        self._loop = asyncio.get_running_loop()
        self._exit_code: concurrent.futures.Future[int] = concurrent.futures.Future()

    @property
    def alive(self) -> bool:
        return not self._exit_code.done()

    @property
    def serves_http(self) -> bool:
        return self.definition.is_server

    def output(self) -> str:
        """Returns what it has printed so far, to stdout and stderr."""
        return self._printed

    def interrupt(self) -> None:
        """Tells it to end, as Modal does at preemption: it has 30 s."""
        self._tell_to_end()
        self._loop.call_soon_threadsafe(self._loop.call_later, GRACE, self.kill)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def wait(self, timeout: float = 60.0) -> int:
        """Returns its exit code once it has ended; raises TimeoutError if it does not end within so many seconds."""
        return self._exit_code.result(timeout)

    def stop(self) -> None:
        """Tells it to end for good."""
        self.stopping = self.draining = True
        self._tell_to_end()

    def drain(self) -> None:
        """Lets it finish its inputs, take no more, and end."""
        self.stopping = self.draining = True
        if self.serves_http:
            self._tell_to_end()
        self.changes.notify()
        self.function.changes.notify()

    def cancel(self, *input_ids: str) -> None:
        """Has these inputs cancelled in the container, as often as it takes."""
        running = [input_id for input_id in input_ids if input_id in self.inputs]
        if running:
            self.to_cancel.update(running)
            self.changes.notify()

    async def attend(self, output: int) -> int:
        """Reads what the process prints to the file descriptor; returns the exit code once all of it has ended."""
        printed = _Output(self)
        transport, _ = await self._loop.connect_read_pipe(lambda: printed, os.fdopen(output, "rb"))
        exited: asyncio.Future[int] = self._loop.create_future()

        def wait() -> None:
            code = self.process.wait()
            self._loop.call_soon_threadsafe(exited.set_result, code)

        threading.Thread(target=wait, name=self.task_id, daemon=True).start()
        code = await exited
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with suppress(TimeoutError):
            await asyncio.wait_for(printed.ended.wait(), 1.0)
        transport.close()
        return code

    def conclude(self, code: int) -> None:
        """Tells everybody that the container has ended."""
        for close in self.at_exit:
            close()
        self._exit_code.set_result(code)
        for changes in (self.changes, self.function.changes, self.function.app.changes):
            changes.notify()

    def _tell_to_end(self) -> None:
        self.ending = True
        self._signal(signal.SIGTERM if self.serves_http else signal.SIGINT)

    def _signal(self, number: int) -> None:
        if self.alive:
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, number)


class _Output(asyncio.Protocol):
    """Reads what a container prints."""

    def __init__(self, container: Container) -> None:
        self._container = container
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self.ended = asyncio.Event()

    def data_received(self, data: bytes) -> None:
        app, text = self._container.function.app, self._decode(data)
        self._container._printed += text
        log = api_pb2.TaskLogs(data=text, file_descriptor=api_pb2.FILE_DESCRIPTOR_STDOUT, timestamp=time.time())
        app.logs.append(api_pb2.TaskLogsBatch(task_id=self._container.task_id, items=[log], entry_id=str(len(app.logs) + 1)))
        app.changes.notify()

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.set()
