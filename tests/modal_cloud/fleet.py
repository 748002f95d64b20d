"""The autoscaler: starts as many containers as are wanted, and replaces containers that end."""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

from grpclib import GRPCError
from modal_proto import api_pb2

from tests.modal_cloud.container import GRACE, Container
from tests.modal_cloud.launching import Launcher
from tests.modal_cloud.state import App, Function

GRACE_AT_THE_END = 5.0  # seconds that containers have when the cloud itself ends
MOST_CONTAINERS = 4  # of a function that sets no limit, on this machine


class Fleet:
    """All containers: starts as many as are wanted, and replaces those that end."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self._tasks: set[asyncio.Task[Any]] = set()
        self._stopped = False
        self.live: list[Container] = []
        self.reschedules = True
        self.replaces = True

    def of(self, function: Function) -> list[Container]:
        return [container for container in self.live if container.function is function]

    def scale(self, function: Function) -> None:
        """Starts containers for the inputs that wait, within the function's limits."""
        most = function.definition.concurrency_limit or MOST_CONTAINERS
        while function.pending and not self._stopped:
            taking = [container for container in self.of(function) if not container.draining]
            room = sum(function.concurrency - len(container.inputs) for container in taking)
            if len(function.pending) <= room or len(taking) >= most:
                return
            try:
                self.start(function)
            except GRPCError as error:
                self.fail_pending(function, _failure(error.message or ""))

    def keep_warm(self, function: Function) -> list[Container]:
        """Starts containers up to the function's minimum, and returns the containers of its current version."""
        current = [
            container for container in self.of(function) if container.version == function.app.version and not container.stopping
        ]
        missing = 0 if self._stopped else function.min_containers - len(current)
        return current + [self.start(function) for _ in range(missing)]

    def fail_pending(self, function: Function, result: api_pb2.GenericResult) -> None:
        while function.pending:
            function.pending.popleft().finish(result, data_format=api_pb2.DATA_FORMAT_PICKLE)

    def background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def start(self, function: Function) -> Container:
        """Starts a container; raises GRPCError if that fails."""
        container, output = self._launcher.start(function)
        self.live.append(container)
        self.background(self._attend(container, output))
        return container

    async def _attend(self, container: Container, output: int) -> None:
        code = await container.attend(output)
        self.live.remove(container)
        container.conclude(code)
        self._settle(container, code)

    def _settle(self, container: Container, code: int) -> None:
        """Sees to the inputs that an ended container leaves behind, and to its replacement."""
        function = container.function
        rescheduled = self.reschedules and container.failure is None and not function.app.stopped
        for call in reversed(container.inputs.values()):
            if call.finished:
                continue
            if rescheduled:
                call.state, call.attempt = "pending", call.attempt + 1
                function.pending.appendleft(call)
            else:
                status = api_pb2.GenericResult.GENERIC_STATUS_INTERNAL_FAILURE
                call.finish(
                    api_pb2.GenericResult(status=status, exception=f"the container was lost (exit code {code})", exitcode=code)
                )
        container.inputs.clear()
        if self._stopped or function.app.stopped:
            return
        if not container.ready and not container.stopping:
            # Modal starts it again and again; here, the calls that wait for it fail.
            self.fail_pending(function, container.failure or _failure(f"the container ended at its start (exit code {code})"))
            return
        self.scale(function)
        if self.replaces and not container.stopping:
            # Without its volume or secret, which may have been deleted meanwhile, none can start, and nobody waits for it.
            with suppress(GRPCError):
                self.keep_warm(function)

    def port_of(self, function: Function) -> Callable[[], Coroutine[Any, Any, int]]:
        """Returns how the relay of a server finds a port that listens, starting a container if there is none."""

        async def port() -> int:
            number = function.definition.http_config.port
            async with asyncio.timeout(function.definition.http_config.startup_timeout):
                if not [container for container in self.of(function) if not container.stopping]:
                    self.start(function)
                while True:
                    await function.changes.until(lambda: any(container.ready for container in self.of(function)))
                    with suppress(ConnectionError):
                        _, writer = await asyncio.open_connection("127.0.0.1", number)
                        writer.close()
                        return number
                    await asyncio.sleep(0.05)  # it says that it is ready before it listens: nothing tells when

        return port

    async def ended(self, containers: list[Container], grace: float | None = GRACE) -> None:
        """Returns when the containers have ended; those that take longer than the grace (s) are killed."""
        await asyncio.gather(*(self._end(container, grace) for container in containers))

    async def _end(self, container: Container, grace: float | None) -> None:
        if not await container.changes.until(lambda: not container.alive, grace):
            container.kill()
            await container.changes.until(lambda: not container.alive)

    async def retire(self, app: App, functions: list[Function]) -> None:
        """After a deployment: starts the containers of the new version, then ends those before it."""
        for function in functions:
            old = [container for container in self.of(function) if container.version < app.version]
            if function.definition.is_server:
                # Both would listen on the same port of this machine.
                for container in old:
                    container.stop()
                await self.ended(old)
            new = self.keep_warm(function) if function.id in {kept.id for kept in app.functions.values()} else []
            for container in new:
                await container.changes.until(lambda container=container: container.ready or not container.alive)  # type: ignore[misc]
            for container in old:
                if container.inputs:
                    container.drain()
                else:
                    container.stop()
                    self.background(self.ended([container]))

    async def stop_app(self, app: App, functions: list[Function]) -> None:
        """Ends all functions of the app, at once."""
        app.state = api_pb2.APP_STATE_STOPPED
        result = api_pb2.GenericResult(status=api_pb2.GenericResult.GENERIC_STATUS_TERMINATED, exception="the app was stopped")
        stopped = [container for function in functions for container in self.of(function)]
        for container in stopped:
            for call in container.inputs.values():
                call.finish(result)
            container.stop()
        for function in functions:
            self.fail_pending(function, result)
            if function.relay is not None:
                function.relay.close()
        await self.ended(stopped)
        app.changes.notify()

    async def stop(self) -> None:
        """Ends all containers: they have 5 s."""
        self._stopped = True
        for container in self.live:
            container.stop()
        await self.ended(list(self.live), GRACE_AT_THE_END)
        while self._tasks:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)


def _failure(what: str) -> api_pb2.GenericResult:
    return api_pb2.GenericResult(status=api_pb2.GenericResult.GENERIC_STATUS_INIT_FAILURE, exception=what)
