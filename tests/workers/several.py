"""Servers of several processes, run as a user runs them, and connections to each of their workers."""

import asyncio
import json
import uuid
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc.aio
import psutil
from flywheel_proto.v1 import generation_pb2 as pb

from tests.server.test_command import command, ready_line
from tests.serving import Target, code_of, connected, until

ARGUMENTS = ("--engine", "scripted", "--address", "127.0.0.1:0", "--log-format", "json", "--workers", "2")


class Several:
    """A server of several processes.

    Attributes:
        process: The parent.
        address: The address that the server listens on.
        log: The lines of the log so far, parsed. A line that is not JSON stands under the key `text`.
    """

    def __init__(self, process: Process, address: str, metadata: Any = ()) -> None:
        self.process = process
        self.address = address
        self.log: list[dict[str, Any]] = []
        self._metadata = metadata
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            try:
                self.log.append(json.loads(line))
            except ValueError:
                self.log.append({"text": line.decode()})

    async def closed(self) -> int:
        """Returns the exit code when the parent has ended and all of its log was read."""
        async with asyncio.timeout(60):
            await self._reading
            return await self.process.wait()

    def events(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.log if line.get("event") == event]

    def pids(self) -> dict[int, int]:
        """Returns the process id of each worker by its number. A replaced worker has the id of its latest process."""
        return {line["number"]: line["pid"] for line in self.events("worker started")}

    @asynccontextmanager
    async def connections(self) -> AsyncIterator[dict[int, Target]]:
        """Gives a connection to each worker, by its number."""
        async with AsyncExitStack() as stack:
            targets: dict[int, Target] = {}

            async def try_one() -> bool:
                target = await stack.enter_async_context(connected(self.address, ("grpc.use_local_subchannel_pool", 1)))
                if (number := await self.worker_of(target)) is not None:
                    targets.setdefault(number, target)
                return len(targets) == 2

            await until(try_one, "a connection to each worker")
            yield targets

    async def worker_of(self, target: Target) -> int | None:
        """Returns the number of the worker that has the connection; None if none answers.

        It is in the log line of an invalid call.
        """
        request_id = uuid.uuid4().hex
        call = target.stub.GenerateAll(pb.GenerationRequest(), metadata=(("x-request-id", request_id), *self._metadata))
        if await code_of(call) is not grpc.StatusCode.INVALID_ARGUMENT:
            return None
        await until(lambda: any(line.get("request_id") == request_id for line in self.log), "the call is in the log")
        (line,) = [line for line in self.log if line.get("request_id") == request_id]
        return int(line["worker"])


@asynccontextmanager
async def several(*arguments: str, metadata: Any = (), setup: str = "") -> AsyncIterator[Several]:
    """Runs a server with two workers until the context ends; `metadata` is that of an accepted call."""
    async with command(*ARGUMENTS, *arguments, stdout=PIPE, stderr=PIPE, setup=setup) as process:
        _, address = await ready_line(process)
        server = Several(process, address, metadata)
        await until(lambda: len(server.pids()) == 2, "the log was read")
        try:
            yield server
        finally:
            if process.returncode is None:
                process.kill()
            await server.closed()
            # Workers end by themselves when their parent is gone.
            await until(lambda: not any(is_running(pid) for pid in server.pids().values()), "no worker is left")


def is_running(pid: int) -> bool:
    """Returns whether there is such a process, and it is no zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
