"""The embedded engine, loaded once for the tests that look inside it."""

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Self

import pytest
import xllamacpp
from flywheel_server.engines.llama_cpp.embedded import EmbeddedEngine, default_model

from tests.serving import Target, serving

SLOTS = 4
BATCH_TOKENS = 16


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


def with_metrics(make: Callable[[], Any]) -> Callable[[], Any]:
    def made() -> Any:
        params = make()
        params.endpoint_metrics = True
        return params

    return made


@dataclass(frozen=True)
class Work:
    """What llama.cpp says of itself: how many samples it works on, and how many steps it has computed so far."""

    busy_slots: int
    steps: int

    @classmethod
    def of(cls, engine: EmbeddedEngine) -> Self:
        pairs = (line.split() for line in engine._llama._server.handle_metrics().splitlines() if not line.startswith("#"))
        metrics = {name: float(value) for name, value in pairs}
        return cls(int(metrics["llamacpp:requests_processing"]), int(metrics["llamacpp:n_decode_total"]))
