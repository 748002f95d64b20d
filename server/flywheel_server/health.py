"""What grpc.health.v1 says: that of the engine, for as long as the server runs."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import structlog
from flywheel_proto.v1 import generation_pb2
from grpc_health.v1 import health, health_pb2

from flywheel_server.engines.base import Engine

log = structlog.stdlib.get_logger(__name__)

SERVICE: Final = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name

RUNNERS: Final = "flywheel.v1.Runners"
"""The name under which health tells whether the engine has runners now: what /health of Flywheel's example tells.

It is not the server's own health: the first call wakes an engine that was scaled to zero, so it must not be turned away.
"""

SERVING: Final = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING: Final = health_pb2.HealthCheckResponse.NOT_SERVING


class Health:
    """Reports what the engine's statistics say: reachable or not, with runners or without."""

    def __init__(self) -> None:
        self.servicer = health.aio.HealthServicer()
        self._reachable = True

    async def report(self, *, serving: bool, runners: bool) -> None:
        """Sets the status of the server, of its service, and of the engine's runners."""
        for name, good in ((health.OVERALL_HEALTH, serving), (SERVICE, serving), (RUNNERS, runners)):
            await self.servicer.set(name, SERVING if good else NOT_SERVING)

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
            await self.servicer.enter_graceful_shutdown()

    async def _look(self, engine: Engine, within: float) -> None:
        try:
            async with asyncio.timeout(within):
                stats = await engine.stats()
        except Exception as error:  # noqa: BLE001 - whatever it is, health must not go on as if nothing were
            if self._reachable:
                log.warning("engine out of reach", error=str(error) or type(error).__name__)
            self._reachable = False
            await self.report(serving=False, runners=False)
        else:
            if not self._reachable:
                log.info("engine within reach again")
            self._reachable = True
            await self.report(serving=True, runners=stats.num_total_runners > 0)
