"""The Flywheel gRPC server, and what an engine of your own needs.

`run` makes a program of an engine, with the flags, signals and log of the command `flywheel-server`:

    sys.exit(run(MyEngine()))

`serve` serves an engine within a program that has an event loop of its own.

An engine is a class with the methods of `Engine`. It gets a request, and emits `Started`, `TextDelta` and
`GenerationResponseSample` into a `Sink`. `flywheel_server.engines.base` documents this protocol, and
`examples/custom_engine.py` in the repository is an engine.

Import only the names in `__all__`. Everything else may change without notice.
"""

import importlib

__all__ = [
    "Capacity",
    "Engine",
    "EngineDiedError",
    "EngineError",
    "EngineFailedError",
    "EngineModel",
    "EngineOverloadedError",
    "EngineSetupError",
    "EngineStats",
    "EngineTimeoutError",
    "EngineUnavailableError",
    "Event",
    "FieldViolation",
    "GenerationRequest",
    "GenerationResponseSample",
    "GrowingSample",
    "InvalidFieldError",
    "LikelyToken",
    "Message",
    "PreparedRequest",
    "PromptFormat",
    "PromptToken",
    "PromptTooLongError",
    "Settings",
    "Sink",
    "Started",
    "StopGate",
    "TextDelta",
    "Token",
    "UnsupportedFieldError",
    "UnsupportedMethodError",
    "__version__",
    "run",
    "serve",
]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from flywheel_proto import __version__

    from flywheel_server.engines.base import (
        Engine,
        EngineError,
        EngineFailedError,
        EngineModel,
        EngineOverloadedError,
        EngineSetupError,
        EngineStats,
        EngineTimeoutError,
        EngineUnavailableError,
        Event,
        InvalidFieldError,
        PreparedRequest,
        PromptFormat,
        PromptToken,
        PromptTooLongError,
        Sink,
        Started,
        TextDelta,
        UnsupportedFieldError,
        UnsupportedMethodError,
    )
    from flywheel_server.engines.capacity import Capacity
    from flywheel_server.engines.samples import GrowingSample, StopGate
    from flywheel_server.launch import run
    from flywheel_server.messages import (
        FieldViolation,
        GenerationRequest,
        GenerationResponseSample,
        LikelyToken,
        Message,
        Token,
    )
    from flywheel_server.server import serve
    from flywheel_server.settings import Settings
    from flywheel_server.supervision import EngineDiedError
else:
    # The fastest to load first, so that an engine's module does not load gRPC. `serve_command` has `serve`, and sets what gRPC
    # reads when it is loaded.
    _MODULES = (
        "flywheel_proto",
        "flywheel_server.engines.base",
        "flywheel_server.messages",
        "flywheel_server.engines.capacity",
        "flywheel_server.engines.samples",
        "flywheel_server.settings",
        "flywheel_server.supervision",
        "flywheel_server.launch",
        "flywheel_server.serve_command",
    )

    def __getattr__(name: str) -> object:
        """Returns a public name, whose first use loads its module (PEP 562): the command heeds signals before it loads any."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        modules = map(importlib.import_module, _MODULES)
        try:
            value = globals()[name] = next(getattr(module, name) for module in modules if hasattr(module, name))
        except ModuleNotFoundError as error:
            from flywheel_proto._extras import install_hint

            raise ModuleNotFoundError(install_hint(error.name or "") or str(error), name=error.name) from error
        return value

    def __dir__() -> list[str]:
        return sorted({*__all__, *globals()})


del TYPE_CHECKING
