"""What grpc.health.v1 says: that of the engine, for as long as the server runs."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final, Protocol

import grpc
import grpc.aio
import structlog
from flywheel_proto._service_name import SERVICE_NAME
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from flywheel_server import running_time
from flywheel_server.engines.base import Engine, EngineUnavailableError
from flywheel_server.system.shortage import shortage_in

log = structlog.stdlib.get_logger(__name__)

RUNNERS: Final = "flywheel.v1.Runners"
"""The name under which health tells whether the engine has runners now: what /health of Flywheel's example tells.

It is not the server's own health: the first call wakes an engine that was scaled to zero, so it must not be turned away.
"""

SERVING: Final = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING: Final = health_pb2.HealthCheckResponse.NOT_SERVING

Context = grpc.aio.ServicerContext[Any, Any]


class HealthServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc] # it has no types
    """Answers with the statuses that were set. The methods write to the context, as all of this server do.

    Instead of the one in grpcio-health-checking, which has no List, and whose `set` waits for every watcher to read.
    """

    def __init__(self) -> None:
        self._statuses: dict[str, int] = {}
        self._changed = asyncio.Event()
        self._ended = False

    def set(self, statuses: dict[str, int]) -> None:
        """Sets the statuses of the services with these names."""
        self._statuses |= statuses
        self._wake()

    def end(self) -> None:
        """Ends every stream of statuses, after the last of them."""
        self._ended = True
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:
        """Sends the status of a service; NOT_FOUND for one that is not there."""
        status = self._statuses.get(request.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "There is no such service here; List has those that are.")
        await context.write(health_pb2.HealthCheckResponse(status=status))

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:
        """Streams the status of a service, now and whenever it changes; SERVICE_UNKNOWN for one that is not there.

        The stream ends when the server stops, with UNAVAILABLE: clients then look again, as gRFC A17 has it.
        """
        last: int | None = None
        while True:
            status = self._statuses.get(request.service, health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
            if status != last:
                await context.write(health_pb2.HealthCheckResponse(status=status))
                last = status
            elif self._ended:
                raise EngineUnavailableError("the server is stopping")
            else:
                await self._changed.wait()

    async def List(self, request: Any, context: Context) -> None:  # noqa: ANN401 - older versions have no type
        """Sends the statuses of all services."""
        statuses = {name: health_pb2.HealthCheckResponse(status=status) for name, status in self._statuses.items()}
        await context.write(health_pb2.HealthListResponse(statuses=statuses))


class Share(Protocol):
    """Takes how this process is, where health is that of several."""

    def __call__(self, *, serving: bool, runners: bool) -> None:
        """Has `Health.show` called with what holds for all, now or later."""


class Health:
    """Reports how the engine is: reachable or not, with runners or without.

    Arguments:
        share: Gets what is reported, if this process is one of several that have one health. By default it is shown.
    """

    def __init__(self, share: Share | None = None) -> None:
        self.servicer = HealthServicer()
        self._share = share or self.show
        self._reachable = True
        self._runners = False
        self._could_look = True
        self._withdrawn = False
        self.show(serving=False, runners=False)

    def report(self, *, serving: bool, runners: bool) -> None:
        """Says how the engine of this process is."""
        self._share(serving=serving, runners=runners)

    def show(self, *, serving: bool, runners: bool) -> None:
        """Sets the status of the server, of its service, and of the engine's runners."""
        good = {health.OVERALL_HEALTH: serving, SERVICE_NAME: serving, RUNNERS: runners}
        self.servicer.set({name: SERVING if good[name] and not self._withdrawn else NOT_SERVING for name in good})

    def withdraw(self) -> None:
        """Says NOT_SERVING from now on, whatever is reported."""
        self._withdrawn = True
        self.show(serving=False, runners=False)

    def end(self) -> None:
        """Ends the streams of those who watch."""
        self.servicer.end()

    @asynccontextmanager
    async def following(self, engine: Engine, interval: float) -> AsyncIterator[None]:
        """Reports at once, and then every `interval` seconds for the length of the context; after it, nothing is serving."""

        async def follow() -> None:
            while True:
                await asyncio.sleep(interval)
                await self._look(engine, interval)

        await self._look(engine, interval)
        following = asyncio.create_task(follow())
        try:
            yield
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            self.report(serving=False, runners=False)

    async def _look(self, engine: Engine, within: float) -> None:
        try:
            async with running_time.timeout(within):
                stats = await engine.stats()
        except Exception as error:  # noqa: BLE001 - whatever it is, health must not go on as if nothing were
            if shortage := shortage_in(error):
                # It tells nothing about the engine: what was reported stays, until there is what another look needs.
                if self._could_look:
                    log.warning("engine not looked at", error=str(shortage) or type(shortage).__name__)
                self._could_look = False
                return
            if engine.is_reachable():
                # Nor does this, except that nobody knows whether there are runners still.
                if self._could_look:
                    log.warning("engine does not say how it is", error=str(error) or type(error).__name__)
                self._could_look = False
                self._reachable = True
                self.report(serving=True, runners=self._runners)
                return
            if self._reachable:
                log.warning("engine out of reach", error=str(error) or type(error).__name__)
            self._reachable = self._runners = False
            self.report(serving=False, runners=False)
        else:
            if not self._reachable:
                log.info("engine within reach again")
            self._reachable = self._could_look = True
            self._runners = stats.num_total_runners > 0
            self.report(serving=True, runners=self._runners)
