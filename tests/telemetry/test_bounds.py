"""However many callers there are, and whatever their names are, the output stays small, and can be read."""

import asyncio
from collections.abc import Iterator

import grpc
import pytest
from flywheel_server.telemetry.calls import CallRecord
from flywheel_server.telemetry.exposition import text_of
from flywheel_server.telemetry.metrics import MAX_CALLERS, OTHER_CALLERS, Metrics
from flywheel_server.telemetry.status_page import status_page

from tests.telemetry.scraping import Figures

GENERATE = "flywheel.v1.GenerationService/Generate"
HOSTILE = (
    '"} 1\nevil_total 7\n#',
    "\\",
    "\n",
    "\r",
    "a" * 100_000,
    "\U0001f999" * 1000,
    "\ud800",
    "",
    "<script>",
    '{le="0.1"}',
)


def ended(caller: str, number: int) -> CallRecord:
    """Returns a call that has ended well."""
    call = CallRecord(GENERATE, "id", "peer")
    call.caller = caller
    call.operation, call.model = "chat", f'model \n"\\{"m" * 100}'
    call.queued_at = call.admitted_at = call.started_at = call.first_output_at = call.began
    call.prompt_tokens, call.generated_tokens = number % 7, 3
    call.ended_at = call.began + 0.5
    call.code = grpc.StatusCode.OK
    return call


def callers(count: int) -> Iterator[str]:
    yield from HOSTILE
    yield from ('\U0001f999\\"\n' * 100 + str(number) for number in range(count - len(HOSTILE)))


@pytest.fixture(scope="module")
def metrics() -> Metrics:
    """Metrics of 100,000 callers, most of whom make one call."""
    metrics = Metrics()
    for number, caller in enumerate(callers(100_000)):
        metrics.end(ended(caller, number))
    return metrics


@pytest.mark.parametrize("openmetrics", [False, True])
async def test_many_callers_and_hostile_names_do_not_grow_the_output(openmetrics: bool, metrics: Metrics) -> None:
    text = await text_of(metrics.registry, openmetrics=openmetrics)
    assert len(text) < 2**20
    read = Figures(text.decode().removesuffix("# EOF\n"))
    calls = read.by("flywheel_caller_calls_total", "caller")
    assert sum(calls.values()) == 100_000 - HOSTILE.count("")
    assert len(calls) <= MAX_CALLERS + 1
    assert calls[OTHER_CALLERS] > 99_000
    assert HOSTILE[0] in calls
    assert not read.total("evil_total")
    assert read.total("rpc_server_call_duration_seconds_count") == 100_000


async def test_the_page_stays_small_too(metrics: Metrics) -> None:
    page = await status_page([], {}, metrics.registry)
    assert len(page.encode(errors="strict")) < 2**20
    assert "<script" not in page
    assert "&lt;script&gt;" in page


async def test_text_is_made_in_small_steps(metrics: Metrics) -> None:
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    text = await text_of(metrics.registry, openmetrics=False)
    counting.cancel()
    assert turns >= text.count(b"\n") / 100
