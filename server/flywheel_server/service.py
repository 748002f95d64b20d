"""Implements `flywheel.v1.GenerationService`: translates each call, runs it, and delivers the answer."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import structlog
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_proto.v1 import generation_pb2_grpc

from flywheel_server import running_time
from flywheel_server.access.callers import caller
from flywheel_server.delivery import (
    MAX_LOGPROBS_ON_LOOP,
    Buffer,
    Delivery,
    DeltaBuffer,
    ReaderPolicy,
    SampleBuffer,
    SampleCollector,
    logprobs_in,
)
from flywheel_server.engines.base import PromptToken
from flywheel_server.errors import SlowReaderError
from flywheel_server.generations import Generation, Generations, GetCounts
from flywheel_server.interceptors.context import CallContext
from flywheel_server.messages import PROMPT_FIELDS, GenerationRequest, InvalidRequestError, RequestLimits
from flywheel_server.translation import (
    model_to_proto,
    prompt_from_proto,
    request_from_proto,
    response_to_proto,
    stats_to_proto,
    tokens_to_proto,
)
from flywheel_server.unknown_fields import refuse_unknown_fields

log = structlog.stdlib.get_logger(__name__)


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """Translates each call, runs it on the engine, and delivers the answer.

    The methods write to the context instead of yielding or returning messages, for two reasons. A cancelled call is cancelled
    inside the method, which stops the engine at once; an abandoned generator would stop it only when it is collected. And a
    call keeps its slots in the engine until its caller has received the answer. (The generated types do not allow for this.)
    """

    def __init__(
        self,
        generations: Generations,
        policy: ReaderPolicy,
        *,
        get_counts: GetCounts,
        max_text_bytes: int,
        max_num_samples: int,
        log_prompts: bool,
    ) -> None:
        self._generations = generations
        self._get_counts = get_counts
        self._policy = policy
        self._delivery = Delivery(policy)
        self._max_text_bytes = max_text_bytes
        self._max_num_samples = max_num_samples
        self._log_prompts = log_prompts

    async def Generate(self, request: pb.GenerationRequest, context: CallContext) -> None:  # type: ignore[override]
        """Streams each whole sample when it has finished."""
        await self._stream(request, SampleBuffer(), context)

    async def GenerateDeltas(self, request: pb.GenerationRequest, context: CallContext) -> None:  # type: ignore[override]
        """Streams the text of all samples while they are generated."""
        await self._stream(request, DeltaBuffer(), context)

    async def GenerateAll(self, request: pb.GenerationRequest, context: CallContext) -> None:  # type: ignore[override]
        """Sends all samples in one message, ordered by index."""
        created = time.time()
        generation_request = await self._translate(request, context)

        async def deliver(generation: Generation) -> None:
            # Without a task of its own, because nothing is written until the generation has finished.
            collector = SampleCollector(context.begin)
            await generation.run(collector)
            samples = collector.finished
            make = partial(response_to_proto, generation_request, created, samples)
            logprobs = sum(logprobs_in(sample.tokens) for sample in samples)
            response = await asyncio.to_thread(make) if logprobs > MAX_LOGPROBS_ON_LOOP else make()
            await self._delivery.deliver_one(generation, response, context.write)

        await self._run(generation_request, context, deliver)

    async def GetModel(self, request: pb.GetModelRequest, context: CallContext) -> None:  # type: ignore[override]
        """Sends the model that is served, and the limits of requests."""
        refuse_unknown_fields(request)
        await self._answer(model_to_proto(self._generations.model(), self._limits()), context)

    async def GetStats(self, request: pb.GetStatsRequest, context: CallContext) -> None:  # type: ignore[override]
        """Sends how busy the service is."""
        refuse_unknown_fields(request)
        counts = await self._get_counts()
        await self._answer(stats_to_proto(counts.engine, active=counts.active, queued=counts.queued), context)

    async def Tokenize(self, request: pb.TokenizeRequest, context: CallContext) -> None:  # type: ignore[override]
        """Sends the tokens of a prompt."""
        prompt = prompt_from_proto(request, self._limits())
        self._log_prompt(prompt)

        async def deliver(tokens: Sequence[PromptToken]) -> None:
            # In a thread: tokens of a large context take a tenth of a second, for which other calls would wait.
            await self._answer(await asyncio.to_thread(tokens_to_proto, tokens), context)

        await self._generations.tokenize(prompt, caller.get(), context.time_remaining(), deliver)

    async def _answer(self, message: pb.Model | pb.Stats | pb.TokenizeResponse, context: CallContext) -> None:
        context.begin()
        try:
            async with running_time.timeout(self._policy.timeout):
                await context.write(message)
        except TimeoutError as error:
            raise SlowReaderError from error

    async def _stream(self, request: pb.GenerationRequest, buffer: Buffer, context: CallContext) -> None:
        def deliver(generation: Generation) -> Awaitable[None]:
            return self._delivery.deliver(generation, buffer, context.send_initial_metadata, context.write)

        await self._run(await self._translate(request, context), context, deliver)

    def _run(
        self, request: GenerationRequest, context: CallContext, deliver: Callable[[Generation], Awaitable[None]]
    ) -> Awaitable[None]:
        return self._generations.run(request, caller.get(), context.time_remaining(), deliver)

    async def _translate(self, message: pb.GenerationRequest, context: CallContext) -> GenerationRequest:
        try:
            request = request_from_proto(message, self._limits())
        except InvalidRequestError as error:
            if error.unchecked is None:
                raise
            further = await self._generations.violations(error.unchecked, caller.get(), context.time_remaining())
            raise InvalidRequestError([*error.violations, *further], error.unsupported) from None
        self._log_prompt(request)
        return request

    def _log_prompt(self, request: GenerationRequest) -> None:
        if self._log_prompts:
            log.info("prompt", **{name: value for name, value in request.model_dump(include={*PROMPT_FIELDS}).items() if value})

    def _limits(self) -> RequestLimits:
        model = self._generations.model()
        return RequestLimits(self._max_text_bytes, self._max_num_samples, model.context_tokens, model.supported_fields)
