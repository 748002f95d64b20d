"""The embedded engine, loaded once for the tests that look inside it."""

from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest
import xllamacpp
from flywheel_server.engines.llama_cpp.default_model import default_model
from flywheel_server.engines.llama_cpp.engine import EmbeddedEngine
from flywheel_server.engines.samples import FinishedSamplesSink
from flywheel_server.messages import GenerationRequest, GenerationResponseSample

from tests.engines.llama_cpp.chat_models import WITH_BOS, WITHOUT_BOS
from tests.engines.llama_cpp.loaded import Loaded
from tests.serving import Target, serving

SLOTS = 4
BATCH_TOKENS = 16
COUNTING = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13,"


@pytest.fixture(scope="session")
def embedded() -> EmbeddedEngine:
    return EmbeddedEngine(
        default_model(), context_tokens=4096, slots=SLOTS, threads=1, batch_tokens=BATCH_TOKENS, prompt_format="raw"
    )


@pytest.fixture(scope="session")
async def embedded_target(embedded: EmbeddedEngine) -> AsyncIterator[Target]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xllamacpp, "CommonParams", with_metrics(xllamacpp.CommonParams))
        async with serving(embedded) as target:
            yield target


@pytest.fixture(scope="session", params=[*WITH_BOS, *WITHOUT_BOS], ids=str)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    with Loaded.running(request.param, tmp_path_factory.mktemp("chat")) as loaded:
        yield loaded


def engine_of(model: Path, slots: int = 1, context_tokens: int = 512) -> EmbeddedEngine:
    return EmbeddedEngine(model, context_tokens=context_tokens, slots=slots, threads=1, batch_tokens=16, prompt_format="raw")


async def samples_of(engine: EmbeddedEngine, request: GenerationRequest) -> list[GenerationResponseSample]:
    prepared = await engine.prepare(request)
    samples = FinishedSamplesSink()
    await engine.generate(prepared, samples)
    return samples.finished


def with_metrics(make: Callable[[], Any]) -> Callable[[], Any]:
    def made() -> Any:
        params = make()
        params.endpoint_metrics = True
        return params

    return made


@dataclass(frozen=True)
class Work:
    """The metrics of llama.cpp: how many samples it works on, and how many steps it has computed so far."""

    busy_slots: int
    steps: int

    @classmethod
    def of(cls, engine: EmbeddedEngine) -> Self:
        pairs = (line.split() for line in engine._llama._server.handle_metrics().splitlines() if not line.startswith("#"))
        metrics = {name: float(value) for name, value in pairs}
        return cls(int(metrics["llamacpp:requests_processing"]), int(metrics["llamacpp:n_decode_total"]))
