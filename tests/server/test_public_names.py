"""What `flywheel_server` offers to whoever imports it: the names of `__all__`, each loaded at its first use."""

import inspect
import subprocess
import sys
from typing import Any

import flywheel_server
import pytest
from flywheel_server import Engine, Settings, run, serve, serve_command
from flywheel_server.engines import base
from flywheel_server.engines.scripted import ScriptedEngine

LAZY = """
import sys
import flywheel_server as server
assert set(server.__all__) <= set(dir(server))
assert "pydantic" not in sys.modules
server.Engine, server.GrowingSample, server.Capacity, server.Settings, server.run
assert "grpc" not in sys.modules
server.serve
assert "grpc" in sys.modules
import os
print(os.environ["GRPC_EXPERIMENTS"])
"""


def test_public_names() -> None:
    for name in flywheel_server.__all__:
        value = getattr(flywheel_server, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__name__ == name
            assert value.__doc__
    public = {name for name, value in vars(flywheel_server).items() if name[0] != "_" and not inspect.ismodule(value)}
    assert sorted(flywheel_server.__all__) == sorted(public | {"__version__"})
    assert {run.__module__, serve.__module__} == {"flywheel_server.launch", "flywheel_server.server"}


def test_the_whole_protocol_of_engines_is_public() -> None:
    names = {name for name, value in vars(base).items() if getattr(value, "__module__", "") == base.__name__}
    defined = {name for name in names if not name.startswith("_")}
    assert defined >= {"Engine", "Sink", "Started", "EngineError"}
    assert defined | {"Event", "PromptFormat", "GenerationRequest", "GenerationResponseSample"} <= set(flywheel_server.__all__)


def test_a_name_is_loaded_at_its_first_use_and_grpc_only_for_serving() -> None:
    done = subprocess.run([sys.executable, "-c", LAZY], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("-event_engine_listener\n", "")


def test_a_name_that_is_not_public_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="module 'flywheel_server' has no attribute 'Serve'"):
        _ = flywheel_server.Serve  # type: ignore[attr-defined]


def test_a_class_that_inherits_must_have_the_methods_that_differ_in_each_engine() -> None:
    assert Engine.__abstractmethods__ == {"prepare", "generate", "check", "model"}


async def test_an_engine_of_ones_own_is_not_served_by_workers_that_cannot_make_it() -> None:
    unused: Any = None
    settings = Settings(engine="scripted", workers=2)
    with pytest.raises(ValueError, match="workers must be 1 with an engine of your own"):
        await serve_command._serve_until_signal(settings, unused, unused, unused, ScriptedEngine())
