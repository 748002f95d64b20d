"""The methods of the class `Model` on Modal: Flywheel's `generate`, and a variant that streams through a queue."""

import asyncio
import functools
import os
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeVar

import modal
import structlog
from pydantic import ValidationError

from flywheel_server import logs
from flywheel_server.deployment.outbox import Outbox
from flywheel_server.deployment.settings import Deployment
from flywheel_server.deployment.supervised import SupervisedEngine, end_container
from flywheel_server.deployment.weights import Weights
from flywheel_server.engines import base
from flywheel_server.engines.base import (
    Engine,
    EngineError,
    EngineFailedError,
    EngineSetupError,
    PreparedRequest,
    Sink,
    UnsupportedFieldError,
)
from flywheel_server.engines.llama_cpp.engine import EmbeddedEngine
from flywheel_server.engines.modal.event_batch import Receipt
from flywheel_server.engines.modal.remote_fields import UNKNOWN_FIELD, further_fields
from flywheel_server.engines.modal.tokenized_prompt import TokenizedPrompt
from flywheel_server.engines.samples import FinishedSamplesSink
from flywheel_server.messages import GenerationRequest, GenerationResponse
from flywheel_server.setting_texts import NONE
from flywheel_server.settings import Settings
from flywheel_server.system import garbage, heap
from flywheel_server.system.cores import usable_cores

if TYPE_CHECKING:
    from flywheel_server.deployment.model_spans import ModelSpans

log = structlog.stdlib.get_logger(__name__)

TraceHeaders = dict[str, str] | None
"""The headers of the trace of a call; None if the gateway sends none. See `flywheel_server.telemetry.trace_context`."""

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

KNOWN_ERRORS: Final = frozenset(
    kind for kind in vars(base).values() if isinstance(kind, type) and issubclass(kind, EngineError)
)
"""The errors that a caller in another container can unpickle."""

GPU_BATCH_TOKENS: Final = 512
"""Tokens that a GPU computes in one step. With fewer it idles; with this many a step still takes well under a second."""

MAX_IDLE_OUTBOXES: Final = 64
"""Maximum number of outboxes that are kept for gateways without calls."""


class _WrongFieldsError(ValueError):
    """The fields of a call are not a valid request."""


def _translating_errors(method: Callable[Arguments, Awaitable[Result]]) -> Callable[Arguments, Awaitable[Result]]:
    """Makes a method raise only `ValueError` (for wrong fields of a call) and the errors of `engines.base`.

    Other errors are logged, and become `EngineFailedError`: the caller might be unable to unpickle them, or might take them for
    errors of Modal's client.
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
            if type(error) in KNOWN_ERRORS:
                raise
            log.exception("call failed", call=modal.current_function_call_id())
            raise EngineFailedError(f"the engine raised {type(error).__name__}") from None

    return translated


@_translating_errors
async def start_engine(weights: Weights, deployment: Deployment, settings: Settings) -> SupervisedEngine:
    """Starts an engine with the weights in the volume, and returns it after its first token. Raises `EngineError`."""
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
        exact_seeds=settings.exact_seeds,
        # For a GPU, reading the file from the volume is faster than mapping it page by page.
        memory_map=not settings.modal_gpu,
    )
    supervised = SupervisedEngine(
        engine, end_container, timeout=settings.engine_timeout, restarts=settings.engine_death == "restart"
    )
    await supervised.__aenter__()
    garbage.exempt()
    return supervised


def _fetch_command(weights: Weights, settings: Settings) -> str:
    """Returns the command that fetches these weights, whichever variables the shell has."""
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
        # An error that the caller can unpickle without pydantic, and without the values, which may be prompts.
        problems = [
            ": ".join(
                [*map(str, problem["loc"][:1]), UNKNOWN_FIELD if problem["type"] == "extra_forbidden" else problem["msg"]]
            )
            for problem in error.errors(include_url=False, include_input=False, include_context=False)
        ]
        raise _WrongFieldsError("; ".join(problems)) from None


def _model_spans(endpoint: str) -> "ModelSpans":
    from flywheel_server.deployment.model_spans import ModelSpans

    return ModelSpans(endpoint)


class RemoteModel:
    """Implements the methods of the class with an engine that has started.

    Arguments:
        engine: The engine.
        otlp_endpoint: The URL of a receiver of traces; None for no traces.
    """

    def __init__(self, engine: Engine, otlp_endpoint: str | None = None) -> None:
        self._engine = engine
        self._container = uuid.uuid4().hex
        # One for each gateway, kept after its calls, so that waiting calls of a gateway that was killed end at once.
        self._outboxes: dict[str, Outbox] = {}
        self._spans = None if otlp_endpoint is None else _model_spans(otlp_endpoint)

    @_translating_errors
    async def generate(self, *, trace_headers: TraceHeaders = None, **fields: Any) -> dict[str, Any]:  # noqa: ANN401 - checked at once
        """Returns the samples as Flywheel does: as a dictionary with the fields of `GenerationResponse`.

        Raises `ValueError` if fields are wrong, and `EngineError`.
        """
        with self._traced("generate", trace_headers) as watching:
            created = time.time()
            request = _request(fields)
            prepared = await self._prepare(request)
            samples = FinishedSamplesSink()
            await self._engine.generate(prepared, watching(samples))
            return GenerationResponse.of(request, created, samples.finished).model_dump(mode="json")

    @_translating_errors
    async def generate_deltas(
        self,
        queue: modal.Queue,
        partition: str,
        call: str,
        *,
        trace_headers: TraceHeaders = None,
        **fields: Any,  # noqa: ANN401 - as above
    ) -> dict[str, Any]:
        """Sends the events of the generation to a partition of the queue, and returns a receipt when the queue has them all.

        Each batch of events has the caller's id `call`. Raises the errors of `generate`, and `EngineUnavailableError` if the
        gateway is gone.
        """
        with self._traced("generate_deltas", trace_headers) as watching:
            request = _request(fields)
            async with self._outbox(queue, partition).sending(call) as sender:
                prepared = await self._prepare(request)
                await self._engine.generate(prepared, watching(sender))
                return Receipt(attempt=sender.attempt, piles=await sender.stored()).model_dump()

    @_translating_errors
    async def tokenize(self, *, trace_headers: TraceHeaders = None, **fields: Any) -> dict[str, Any]:  # noqa: ANN401 - as above
        """Returns the tokens of the prompt as a dictionary with the fields of `TokenizedPrompt`.

        Raises the errors of `generate`, and `UnsupportedMethodError`.
        """
        with self._traced("tokenize", trace_headers):
            prepared = await self._prepare(_request(fields))
            return TokenizedPrompt(tokens=tuple(await self._engine.tokenize(prepared))).model_dump(mode="json")

    @contextmanager
    def _traced(self, method: str, headers: TraceHeaders) -> Iterator[Callable[[Sink], Sink]]:
        """Traces a call, and yields a function that makes its sink note the first events."""
        if self._spans is None:
            yield lambda sink: sink
        else:
            with self._spans.call(method, headers) as span:
                yield span.watching

    async def _prepare(self, request: GenerationRequest) -> PreparedRequest:
        """Prepares the request. Raises `UnsupportedFieldError` if the engine does not honour a field that is set."""
        supported = self._engine.model().supported_fields
        if fields := [name for name in further_fields(request) if name not in supported]:
            raise UnsupportedFieldError(fields[0], "the model does not support it", fields[1:])
        return await self._engine.prepare(request)

    async def leave(self) -> None:
        """Ends the streams, and tells their gateways. Call it when the container ends, before the engine ends.

        Returns within 8 s, even if Modal cannot be reached.
        """
        await asyncio.gather(*(outbox.leave() for outbox in self._outboxes.values()))

    async def stop_tracing(self) -> None:
        """Sends the traces that have not been sent yet. Call it when the engine has ended. Returns within 2 s."""
        if self._spans is not None:
            await self._spans.stop()

    def _outbox(self, queue: modal.Queue, partition: str) -> Outbox:
        outbox = self._outboxes.get(partition)
        if outbox is None:
            idle = [known for known, other in self._outboxes.items() if other.is_idle]
            for known in idle[:-MAX_IDLE_OUTBOXES]:
                del self._outboxes[known]
            outbox = self._outboxes[partition] = Outbox(queue, partition, self._container)
        return outbox
