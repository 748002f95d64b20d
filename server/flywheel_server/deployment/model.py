"""What the class `Model` on Modal offers to callers: Flywheel's `generate`, and the same streamed through a queue."""

import os
import time
from contextlib import aclosing
from pathlib import Path
from typing import Any, Final

import modal
from pydantic import ValidationError

from flywheel_server import logs
from flywheel_server.deployment.settings import Deployment
from flywheel_server.deployment.weights import Weights
from flywheel_server.engines import remote_events
from flywheel_server.engines.base import Engine
from flywheel_server.engines.embedded import EmbeddedEngine
from flywheel_server.merging import in_piles
from flywheel_server.messages import GenerationRequest, GenerationResponse, GenerationResponseSample
from flywheel_server.settings import Settings

PARTITION_TTL: Final = 3600
"""Seconds after which Modal clears what nobody has read of a generation, because its caller has gone."""


GPU_BATCH_TOKENS: Final = 512
"""Tokens that a GPU computes in one step: with fewer it idles, and still a step takes well under a second."""


async def started(weights: Weights, deployment: Deployment, settings: Settings) -> EmbeddedEngine:
    """Returns the engine that runs the weights in the volume, once it has produced a token; raises `EngineError`."""
    logs.configure(settings.log_level, settings.log_format)
    engine = EmbeddedEngine(
        weights.path(Path(deployment.weights_path)),
        context_tokens=settings.modal_context,
        slots=deployment.model_slots,
        threads=os.cpu_count() or 1,
        batch_tokens=GPU_BATCH_TOKENS if settings.modal_gpu else settings.embedded_batch,
        prompt_format=settings.modal_prompt,
    )
    await engine.__aenter__()
    await engine.check()
    return engine


def _request(fields: dict[str, Any]) -> GenerationRequest:
    try:
        return GenerationRequest(**fields)
    except ValidationError as error:
        # One that the caller can unpickle without this package, or pydantic.
        raise ValueError(str(error)) from None


async def generate(engine: Engine, **fields: Any) -> dict[str, Any]:  # noqa: ANN401 - checked at once
    """Returns the samples as Flywheel does: a dictionary in the shape of `GenerationResponse`.

    Raises `ValueError` for fields that are wrong, and `EngineError`.
    """
    created = time.time()
    request = _request(fields)
    async with aclosing(engine.generate(request)) as events:
        samples = [event async for event in events if isinstance(event, GenerationResponseSample)]
    return GenerationResponse.of(request, created, samples).model_dump(mode="json")


async def generate_deltas(engine: Engine, queue: modal.Queue, partition: str, **fields: Any) -> None:  # noqa: ANN401 - as above
    """Puts the events of the generation into a partition of the queue, in piles, and returns when all are there.

    Raises what `generate` does. A queue that is full, because nobody reads it fast enough, is waited for.
    """
    async with aclosing(engine.generate(_request(fields))) as events, aclosing(in_piles(events)) as piles:
        async for pile in piles:
            await queue.put.aio(remote_events.pack(pile), partition=partition, partition_ttl=PARTITION_TTL)
