"""The servicer of `flywheel.v1.GenerationService`: it conducts, and leaves the work to the rooms around it."""

import time
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Any

import grpc.aio
import structlog
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_proto.v1 import generation_pb2_grpc

from flywheel_server.engines.base import Engine, EngineModel, EngineUnavailableError
from flywheel_server.generations import Events, Generations
from flywheel_server.merging import DeltaMerger, in_piles
from flywheel_server.messages import GenerationRequest, GenerationResponse, GenerationResponseSample, RequestLimits
from flywheel_server.translation import (
    model_to_proto,
    request_from_proto,
    response_to_proto,
    sample_to_proto,
    stats_to_proto,
)

log = structlog.stdlib.get_logger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """Translates each call, runs it on the engine, and streams what comes of it.

    The streaming methods write instead of yielding: cancellation then arrives inside them, whatever they wait for, and stops
    the engine at once rather than when the abandoned generator is collected. (The generated types know only generators.)
    """

    def __init__(self, engine: Engine, *, max_text_bytes: int, max_num_samples: int) -> None:
        self._engine = engine
        self._generations = Generations(engine)
        self._max_text_bytes = max_text_bytes
        self._max_num_samples = max_num_samples
        self._model: EngineModel | None = None

    def open(self) -> None:
        """Begins to serve: the engine has started."""
        self._model = self._engine.model()

    async def close(self, drain_timeout: float) -> None:
        """Refuses new calls, and returns when the running ones have ended, after `drain_timeout` seconds at the latest."""
        self._model = None
        running = self._generations.active + self._generations.queued
        log.info("stopping", running_calls=running, drain_timeout=drain_timeout if running else 0)
        await self._generations.drain(drain_timeout)

    async def Generate(self, request: pb.GenerationRequest, context: Context) -> None:  # type: ignore[override]
        """Streams each sample, whole, as soon as it has finished."""
        async with self._run(self._translate(request), context) as events:
            async for event in events:
                if isinstance(event, GenerationResponseSample):
                    await context.write(sample_to_proto(event))

    async def GenerateDeltas(self, request: pb.GenerationRequest, context: Context) -> None:  # type: ignore[override]
        """Streams the text of all samples while it is made."""
        merger = DeltaMerger()
        async with self._run(self._translate(request), context) as events, aclosing(in_piles(events)) as piles:
            async for pile in piles:
                for delta in merger.merge(pile):
                    await context.write(delta)

    async def GenerateAll(self, request: pb.GenerationRequest, context: Context) -> pb.GenerationResponse:
        """Returns all samples, in the order of their index."""
        created = time.time()
        generation_request = self._translate(request)
        async with self._run(generation_request, context) as events:
            samples = [event async for event in events if isinstance(event, GenerationResponseSample)]
        return response_to_proto(GenerationResponse.of(generation_request, created, samples))

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.Model:
        """Returns what is served."""
        return model_to_proto(self._serving(), self._limits())

    async def GetStats(self, request: pb.GetStatsRequest, context: Context) -> pb.Stats:
        """Returns how busy the service is."""
        return stats_to_proto(await self._engine.stats(), active=self._generations.active, queued=self._generations.queued)

    def _run(self, request: GenerationRequest, context: Context) -> AbstractAsyncContextManager[Events]:
        return self._generations.run(request, context.time_remaining())

    def _translate(self, request: pb.GenerationRequest) -> GenerationRequest:
        return request_from_proto(request, self._limits())

    def _limits(self) -> RequestLimits:
        return RequestLimits(self._max_text_bytes, self._max_num_samples, self._serving().context_tokens)

    def _serving(self) -> EngineModel:
        if self._model is None:
            raise EngineUnavailableError("the server is starting or stopping")
        return self._model
