"""Creates the engine that the settings name. Only that engine is imported: others may need an extra that is missing."""

from pathlib import Path
from typing import assert_never

from flywheel_proto._extras import reason

from flywheel_server.engines.base import Engine, EngineError, EngineModel, EngineUnavailableError
from flywheel_server.settings import MAX_THREADS, Settings
from flywheel_server.system.cores import usable_cores


def create_engine(settings: Settings) -> Engine:
    """Returns the engine of the settings, not yet started.

    Raises `EngineUnavailableError` if there is no model, or if the engine cannot be imported, for example because an extra is
    missing.
    """
    try:
        return _engine(settings)
    except EngineError:
        raise
    except Exception as error:
        raise EngineUnavailableError(f"the {settings.engine} engine cannot be used: {reason(error)}") from error


def _engine(settings: Settings) -> Engine:
    match settings.engine:
        case "embedded":
            from flywheel_server.engines.llama_cpp.default_model import default_model
            from flywheel_server.engines.llama_cpp.engine import EmbeddedEngine

            return EmbeddedEngine(
                Path(settings.model) if settings.model else default_model(),
                context_tokens=settings.embedded_context,
                slots=settings.embedded_slots,
                threads=settings.embedded_threads or min(usable_cores(), MAX_THREADS),
                batch_tokens=settings.embedded_batch,
                prompt_format=None if settings.embedded_prompt == "auto" else settings.embedded_prompt,
                prompt_cache=settings.embedded_prompt_cache,
                exact_seeds=settings.exact_seeds,
            )
        case "flywheel":
            from flywheel_server.engines.modal.engine import FlywheelEngine
            from flywheel_server.engines.modal.errors import Target

            return FlywheelEngine(
                Target(settings.modal_app, settings.modal_class, settings.modal_environment),
                gpu=settings.modal_gpu,
                timeout=settings.modal_timeout,
                as_deployed=settings.modal_as_deployed,
                model=EngineModel(
                    name=settings.model or settings.modal_app,
                    engine="flywheel",
                    context_tokens=settings.modal_context,
                    penalizes_prompt=settings.modal_penalizes_prompt,
                    prompt_format=settings.modal_prompt,
                ),
            )
        case "scripted":
            from flywheel_server.engines.scripted import ScriptedEngine

            return ScriptedEngine(settings.script)
        case unknown:
            assert_never(unknown)
