"""The servers that the conformance suite runs over: each engine, and with --address a running server."""

from collections.abc import AsyncIterator

import pytest
from flywheel_server.engines.llama_cpp.default_model import default_model
from flywheel_server.engines.llama_cpp.engine import EmbeddedEngine
from flywheel_server.engines.scripted import Script, ScriptedEngine

from examples.custom_engine import EchoEngine
from tests.modal_cloud import ModalCloud, scripted
from tests.serving import Target, connected, serving

ENGINES = ["scripted", "embedded", "flywheel", "flywheel-whole", "example", "running"]
"""The last one is a running server."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "target" in metafunc.fixturenames:
        engines = ENGINES if metafunc.config.getoption("address") else ENGINES[:-1]
        metafunc.parametrize("target", engines, indirect=True, scope="session")


def embedded() -> EmbeddedEngine:
    return EmbeddedEngine(default_model(), context_tokens=8192, slots=8, threads=1, batch_tokens=32, prompt_format="chat")


SCRIPT = Script(text="The llama 🦙 says: é, 1, 2, 3 and ends. ", bytes_per_token=3, token_delay=0.001)


@pytest.fixture(scope="session")
def on_modal(cloud: ModalCloud) -> str:
    scripted.deploy(cloud, "conformance", SCRIPT)
    return "conformance"


@pytest.fixture(scope="session")
async def target(request: pytest.FixtureRequest) -> AsyncIterator[Target]:
    match request.param:
        case "scripted":
            async with serving(ScriptedEngine(SCRIPT)) as server:
                yield server
        case "flywheel" | "flywheel-whole":
            # Our class, which streams, and one that returns samples whole, as MK1's does.
            class_name = "Model" if request.param == "flywheel" else "Flywheel"
            app = request.getfixturevalue("on_modal")
            async with serving(scripted.engine(app, class_name, name=request.param)) as server:
                yield server
        case "example":
            async with serving(EchoEngine()) as server:
                yield server
        case "embedded":
            async with serving(embedded()) as server:
                yield server
        case _:
            async with connected(request.config.getoption("address")) as server:
                yield server
