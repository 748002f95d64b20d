"""Serves grpc.health.v1: reports whether the engine can be reached, and whether the server is stopping."""

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
from flywheel_server.activity import stats_of
from flywheel_server.engines.base import Engine, EngineUnavailableError
from flywheel_server.grpc_types import GrpcContext
from flywheel_server.system.shortage import shortage_in

log = structlog.stdlib.get_logger(__name__)

RUNNERS: Final = "flywheel.v1.Runners"
"""The service name under which health reports whether the engine has runners now, as /health of Flywheel's example does.

It is apart from the server's own health: an engine that is scaled to zero is woken by the first call, so calls must reach it.
"""

SERVING: Final = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING: Final = health_pb2.HealthCheckResponse.NOT_SERVING


class HealthServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc] # it has no types
    """Answers with the statuses that were set. The methods write to the context, as all methods of this server do.

    It replaces the servicer of grpcio-health-checking, which has no List, and whose `set` waits until every watcher has read.
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
        """Ends every Watch stream after its last status."""
        self._ended = True
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: GrpcContext) -> None:
        """Sends the status of a service. Ends with NOT_FOUND if the service is unknown."""
        status = self._statuses.get(request.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "There is no such service here. List returns the services.")
        await context.write(health_pb2.HealthCheckResponse(status=status))

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: GrpcContext) -> None:
        """Streams the status of a service, now and whenever it changes; SERVICE_UNKNOWN if the service is unknown.

        The stream ends with UNAVAILABLE when the server stops. Clients then watch again (gRFC A17).
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

    async def List(self, request: Any, context: GrpcContext) -> None:  # noqa: ANN401 - older versions have no type
        """Sends the statuses of all services."""
        statuses = {name: health_pb2.HealthCheckResponse(status=status) for name, status in self._statuses.items()}
        await context.write(health_pb2.HealthListResponse(statuses=statuses))


class Share(Protocol):
    """Combines the health of several processes."""

    def __call__(self, *, serving: bool, runners: bool) -> None:
        """Takes the health of this process, and has `Health.show` called with the health of all processes, now or later."""


class Health:
    """Probes the engine, and sets the statuses: whether it can be reached, and whether it has runners.

    Arguments:
        share: Combines the health of this process with the health of others. By default, this process is alone.
    """

    def __init__(self, share: Share | None = None) -> None:
        self.servicer = HealthServicer()
        self._share = share or self.show
        self._reachable = True
        self._runners = False
        self._warns_if_inconclusive = True
        """Whether to log an inconclusive probe: only the first one since a probe succeeded."""
        self._withdrawn = False
        self.show(serving=False, runners=False)

    def report(self, *, serving: bool, runners: bool) -> None:
        """Reports the health of the engine of this process."""
        self._share(serving=serving, runners=runners)

    def show(self, *, serving: bool, runners: bool) -> None:
        """Sets the statuses of the server, of its service, and of the engine's runners."""
        good = {health.OVERALL_HEALTH: serving, SERVICE_NAME: serving, RUNNERS: runners}
        self.servicer.set({name: SERVING if good[name] and not self._withdrawn else NOT_SERVING for name in good})

    def withdraw(self) -> None:
        """Sets all statuses to NOT_SERVING from now on, whatever is reported."""
        self._withdrawn = True
        self.show(serving=False, runners=False)

    def end(self) -> None:
        """Ends all Watch streams."""
        self.servicer.end()

    @asynccontextmanager
    async def probing(self, engine: Engine, interval: float) -> AsyncIterator[None]:
        """Probes the engine now and every `interval` seconds. At the end of the context, reports that it is not serving."""

        async def probe_repeatedly() -> None:
            while True:
                await asyncio.sleep(interval)
                await self._probe(engine, interval)

        await self._probe(engine, interval)
        probing = asyncio.create_task(probe_repeatedly())
        try:
            yield
        finally:
            probing.cancel()
            await asyncio.gather(probing, return_exceptions=True)
            self.report(serving=False, runners=False)

    async def _probe(self, engine: Engine, seconds: float) -> None:
        try:
            async with running_time.timeout(seconds):
                stats = await stats_of(engine)
        except Exception as error:  # noqa: BLE001 - whatever it is, health must not stay as if the probe had succeeded
            if shortage := shortage_in(error):
                # It says nothing about the engine, so the last report stays until a probe can be made again.
                self._warn_of_inconclusive("engine not looked at", shortage)
            elif engine.is_reachable():
                # The engine did not answer, but can be reached. Whether it still has runners is unknown.
                self._warn_of_inconclusive("engine does not say how it is", error)
                self._reachable = True
                self.report(serving=True, runners=self._runners)
            else:
                if self._reachable:
                    log.warning("engine out of reach", error=_text(error))
                self._reachable = self._runners = False
                self.report(serving=False, runners=False)
        else:
            if not self._reachable:
                log.info("engine within reach again")
            self._reachable = self._warns_if_inconclusive = True
            self._runners = stats.num_total_runners > 0
            self.report(serving=True, runners=self._runners)

    def _warn_of_inconclusive(self, event: str, error: BaseException) -> None:
        if self._warns_if_inconclusive:
            log.warning(event, error=_text(error))
        self._warns_if_inconclusive = False


def _text(error: BaseException) -> str:
    return str(error) or type(error).__name__
