"""A receiver of spans, for tests of traces."""

from collections.abc import AsyncIterator

import pytest

from tests.telemetry.otlp_receiver import Receiver, receiving


@pytest.fixture
def spans_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has spans sent soon after they have ended."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as receiver:
        yield receiver
