"""What the class `Model` on Modal offers to callers: Flywheel's `generate`, and the same streamed through a queue."""

import asyncio
import functools
import os
import time
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, ParamSpec, TypeVar

import modal
import structlog
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from flywheel_server import logs
from flywheel_server.deployment.outbox import Outbox
from flywheel_server.deployment.settings import Deployment
from flywheel_server.deployment.supervised import SupervisedEngine, end_container
from flywheel_server.deployment.weights import Weights
from flywheel_server.engines import base
from flywheel_server.engines.base import Engine, EngineError, EngineFailedError, EngineSetupError
from flywheel_server.engines.llama_cpp.engine import EmbeddedEngine
from flywheel_server.engines.modal.event_batch import Receipt
from flywheel_server.engines.modal.remote_fields import UNKNOWN_FIELD
from flywheel_server.engines.samples import SampleCollector
from flywheel_server.messages import GenerationRequest, GenerationResponse
from flywheel_server.setting_texts import NONE
from flywheel_server.settings import Settings
from flywheel_server.system import heap
from flywheel_server.system.cores import usable_cores

log = structlog.stdlib.get_logger(__name__)

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

ERRORS: Final = frozenset(kind for kind in vars(base).values() if isinstance(kind, type) and issubclass(kind, EngineError))
"""The errors that callers know."""

GPU_BATCH_TOKENS: Final = 512
"""Tokens that a GPU computes in one step: with fewer it idles, and still a step takes well under a second."""

MAX_OUTBOXES: Final = 64
"""How many gateways are remembered that have no call here now."""


class _WrongFieldsError(ValueError):
    """The fields of a call are no request."""


def _translating_errors(method: Callable[Arguments, Awaitable[Result]]) -> Callable[Arguments, Awaitable[Result]]:
    """Returns the method, which raises only `ValueError` if the fields of a call are wrong, and the errors of `engines.base`.

    What else it raises, the caller could perhaps not unpickle, or would take it for an error of Modal's client. The log has it.
    """

    @functools.wraps(method)
    async def translated(*arguments: Arguments.args, **fields: Arguments.kwargs) -> Result:
        try:
            return await method(*arguments, **fields)
        except _WrongFieldsError as error:
            raise ValueError(str(error)) from None
        except (KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError) and (task := asyncio.current_task()) and task.cancelling():
                raise
            if type(error) in ERRORS:
                raise
            log.exception("call failed", call=modal.current_function_call_id())
            raise EngineFailedError(f"the engine raised {type(error).__name__}") from None

    return translated


@_translating_errors
async def started(weights: Weights, deployment: Deployment, settings: Settings) -> SupervisedEngine:
    """Returns the engine that runs the weights in the volume, once it has produced a token; raises `EngineError`."""
    heap.limit_heaps()
    logs.configure(settings.log_level, settings.log_format)
    path = weights.path(Path(deployment.weights_path))
    if not path.is_file():
        raise EngineSetupError(
            f"the weights {weights.name} are not in the volume; fetch them: {_fetch_command(weights, settings)}",
            {"weights": weights.name, "setting": "FLYWHEEL_DEPLOY_WEIGHTS"},
        )
    engine = EmbeddedEngine(
        path,
        context_tokens=settings.modal_context,
        slots=deployment.model_slots,
        threads=min(deployment.model_threads, usable_cores()),
        batch_tokens=GPU_BATCH_TOKENS if settings.modal_gpu else settings.embedded_batch,
        prompt_format=settings.modal_prompt,
        # What goes to a GPU is read faster than it is mapped, page by page, out of a volume.
        memory_map=not settings.modal_gpu,
    )
    supervised = SupervisedEngine(
        engine, end_container, timeout=settings.engine_timeout, restarts=settings.engine_death == "restart"
    )
    return await supervised.__aenter__()


def _fetch_command(weights: Weights, settings: Settings) -> str:
    """Returns the command that fetches these weights from any shell, whichever variables are set there."""
    environment = os.environ.get("MODAL_ENVIRONMENT")
    options = f"-e {environment} " if environment else ""
    return (
        f"FLYWHEEL_DEPLOY_WEIGHTS={weights.name} FLYWHEEL_MODAL_GPU={settings.modal_gpu or NONE} "
        f"modal run {options}modal_deploy.py::fetch_weights"
    )


def _request(fields: dict[str, Any]) -> GenerationRequest:
    try:
        return GenerationRequest(**fields)
    except ValidationError as error:
        # One that the caller can unpickle without this package, or pydantic; and without the values, which may be prompts.
        problems = error.errors(include_url=False, include_input=False, include_context=False)
        raise _WrongFieldsError("; ".join(f"{problem['loc'][0]}: {_said(problem)}" for problem in problems)) from None


def _said(problem: ErrorDetails) -> str:
    return UNKNOWN_FIELD if problem["type"] == "extra_forbidden" else problem["msg"]


class RemoteModel:
    """The methods of the class, over an engine that has started."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._container = uuid.uuid4().hex
        # One for each gateway. They outlive their calls: a gateway that was killed may have many more of them waiting.
        self._outboxes: dict[str, Outbox] = {}

    @_translating_errors
    async def generate(self, **fields: Any) -> dict[str, Any]:  # noqa: ANN401 - checked at once
        """Returns the samples as Flywheel does: a dictionary in the shape of `GenerationResponse`.

        Raises `ValueError` for fields that are wrong, and `EngineError`.
        """
        created = time.time()
        request = _request(fields)
        prepared = await self._engine.prepare(request)
        samples = SampleCollector()
        await self._engine.generate(prepared, samples)
        return GenerationResponse.of(request, created, samples.finished).model_dump(mode="json")

    @_translating_errors
    async def generate_deltas(self, queue: modal.Queue, partition: str, call: str, **fields: Any) -> dict[str, Any]:  # noqa: ANN401 - as above
        """Sends the events of the generation to a partition of the queue, and returns a receipt when all are there.

        Piles and receipt are those of `engines.modal.event_batch`, the piles under the id that the caller gave the call. Raises
        what `generate` does, and `EngineUnavailableError` if nobody reads the queue.
        """
        request = _request(fields)
        async with self._outbox(queue, partition).sending(call) as sender:
            prepared = await self._engine.prepare(request)
            await self._engine.generate(prepared, sender)
            return Receipt(attempt=sender.attempt, piles=await sender.stored()).model_dump()

    async def leave(self) -> None:
        """Ends the streams, and tells their gateways so: to be called when the container ends, before the engine does.

        Returns within 8 s, whether or not Modal can be reached.
        """
        await asyncio.gather(*(outbox.leave() for outbox in self._outboxes.values()))

    def _outbox(self, queue: modal.Queue, partition: str) -> Outbox:
        outbox = self._outboxes.get(partition)
        if outbox is None:
            idle = [known for known, other in self._outboxes.items() if other.is_idle]
            for known in idle[:-MAX_OUTBOXES]:
                del self._outboxes[known]
            outbox = self._outboxes[partition] = Outbox(queue, partition, self._container)
        return outbox
