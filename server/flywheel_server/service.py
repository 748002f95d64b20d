"""The servicer of `flywheel.v1.GenerationService`: translates each call, hands it over, and delivers the answer."""

import time
from collections.abc import Awaitable, Callable

import structlog
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_proto.v1 import generation_pb2_grpc

from flywheel_server import running_time
from flywheel_server.access.callers import caller
from flywheel_server.counts import Count
from flywheel_server.delivery import Buffer, Delivery, DeltaBuffer, ReaderPolicy, SampleBuffer, SampleCollector
from flywheel_server.errors import SlowReaderError
from flywheel_server.generations import Generation, Generations
from flywheel_server.interceptors.context import CallContext
from flywheel_server.messages import GenerationRequest, RequestLimits
from flywheel_server.translation import (
    model_to_proto,
    request_from_proto,
    response_to_proto,
    stats_to_proto,
)

log = structlog.stdlib.get_logger(__name__)


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """Translates each call, runs it on the engine, and streams what comes of it.

    The methods write to the context instead of yielding or returning. Cancellation then arrives inside them, whatever they wait
    for, and stops the engine at once rather than when an abandoned generator is collected; and a call holds its place until its
    caller has taken the answer. (The generated types know only generators and results.)
    """

    def __init__(
        self,
        generations: Generations,
        policy: ReaderPolicy,
        *,
        count: Count,
        max_text_bytes: int,
        max_num_samples: int,
        log_prompts: bool,
    ) -> None:
        self._generations = generations
        self._count = count
        self._policy = policy
        self._delivery = Delivery(policy)
        self._max_text_bytes = max_text_bytes
        self._max_num_samples = max_num_samples
        self._log_prompts = log_prompts

    async def Generate(self, request: pb.GenerationRequest, context: CallContext) -> None:  # type: ignore[override]
        """Streams each sample, whole, as soon as it has finished."""
        await self._stream(request, SampleBuffer(), context)

    async def GenerateDeltas(self, request: pb.GenerationRequest, context: CallContext) -> None:  # type: ignore[override]
        """Streams the text of all samples while it is made."""
        await self._stream(request, DeltaBuffer(), context)

    async def GenerateAll(self, request: pb.GenerationRequest, context: CallContext) -> None:  # type: ignore[override]
        """Sends all samples, in the order of their index."""
        created = time.time()
        generation_request = self._translate(request)

        async def deliver(generation: Generation) -> None:
            # In this task, as there is nothing to write until all has been generated.
            collector = SampleCollector(context.begin)
            await generation.run(collector)
            response = response_to_proto(generation_request, created, collector.samples)
            await self._delivery.deliver_one(generation, response, context.write)

        await self._run(generation_request, context, deliver)

    async def GetModel(self, request: pb.GetModelRequest, context: CallContext) -> None:  # type: ignore[override]
        """Sends what is served."""
        await self._answer(model_to_proto(self._generations.model(), self._limits()), context)

    async def GetStats(self, request: pb.GetStatsRequest, context: CallContext) -> None:  # type: ignore[override]
        """Sends how busy the service is."""
        counts = await self._count()
        await self._answer(stats_to_proto(counts.engine, active=counts.active, queued=counts.queued), context)

    async def _answer(self, message: pb.Model | pb.Stats, context: CallContext) -> None:
        context.begin()
        try:
            async with running_time.timeout(self._policy.timeout):
                await context.write(message)
        except TimeoutError as error:
            raise SlowReaderError from error

    async def _stream(self, request: pb.GenerationRequest, buffer: Buffer, context: CallContext) -> None:
        def deliver(generation: Generation) -> Awaitable[None]:
            return self._delivery.deliver(generation, buffer, context.send_initial_metadata, context.write)

        await self._run(self._translate(request), context, deliver)

    def _run(
        self, request: GenerationRequest, context: CallContext, deliver: Callable[[Generation], Awaitable[None]]
    ) -> Awaitable[None]:
        return self._generations.run(request, caller.get(), context.time_remaining(), deliver)

    def _translate(self, message: pb.GenerationRequest) -> GenerationRequest:
        request = request_from_proto(message, self._limits())
        if self._log_prompts:
            log.info("prompt", text=request.text)
        return request

    def _limits(self) -> RequestLimits:
        return RequestLimits(self._max_text_bytes, self._max_num_samples, self._generations.model().context_tokens)
