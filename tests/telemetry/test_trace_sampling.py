"""How many traces begin at the server: a bounded number each second, of which strangers cannot take the share of others."""

import asyncio
import time

import grpc
import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.engines.scripted import ScriptedEngine
from flywheel_server.telemetry.rate_limit import RateLimit
from flywheel_server.telemetry.tracing import MAX_TRACES_PER_SECOND, SAMPLERS
from opentelemetry.sdk.trace import sampling

from tests.serving import Target, code_of, serving, until
from tests.telemetry.otlp_receiver import Receiver

pytestmark = pytest.mark.usefixtures("spans_soon")

KEY = "k" * 32
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
CALLS = 8 * MAX_TRACES_PER_SECOND
"""More than begin in the time that they take, even if the machine is slow."""


async def call(target: Target, *metadata: tuple[str, str]) -> grpc.StatusCode:
    return await code_of(target.stub.GetStats(pb.GetStatsRequest(), metadata=metadata))


async def test_traces_that_begin_here_are_limited_and_the_callers_decision_is_obeyed_beyond(receiver: Receiver) -> None:
    async with serving(ScriptedEngine(), otlp_endpoint=receiver.endpoint) as target:
        began = time.monotonic()
        await asyncio.gather(*(call(target) for _ in range(CALLS)))
        allowed = MAX_TRACES_PER_SECOND * (1 + time.monotonic() - began)
        await call(target, ("traceparent", f"00-{TRACE_ID}-00f067aa0ba902b7-01"))
        await until(lambda: any(span.trace_id.hex() == TRACE_ID for span, _ in receiver.spans), "the caller's trace")
    begun_here = [span for span, _ in receiver.spans if not span.parent_span_id]
    assert MAX_TRACES_PER_SECOND <= len(begun_here) <= allowed


@pytest.mark.parametrize("sampler", ["parentbased_always_on", "Always_On", "traceidratio"])
async def test_the_variable_of_opentelemetry_wins(sampler: str, receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", sampler)
    async with serving(ScriptedEngine(), otlp_endpoint=receiver.endpoint) as target:
        await asyncio.gather(*(call(target) for _ in range(CALLS)))
        await until(lambda: len(receiver.spans) == CALLS, "all spans")


@pytest.mark.parametrize("value", ["", " ", "nonsense", " always_on"])
async def test_a_sampler_that_opentelemetry_does_not_know_leaves_the_limit_on(
    value: str, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", value)
    async with serving(ScriptedEngine(), otlp_endpoint=receiver.endpoint) as target:
        began = time.monotonic()
        await asyncio.gather(*(call(target) for _ in range(CALLS)))
        allowed = MAX_TRACES_PER_SECOND * (1 + time.monotonic() - began)
    assert MAX_TRACES_PER_SECOND <= len(receiver.spans) <= allowed


def test_the_samplers_are_those_of_opentelemetry() -> None:
    assert sampling._KNOWN_SAMPLERS.keys() == SAMPLERS


@pytest.mark.parametrize("header", [("x-other", "x"), ("traceparent", "00-none")], ids=["none", "invalid"])
async def test_strangers_leave_enough_traces_for_others(header: tuple[str, str], receiver: Receiver) -> None:
    async with serving(ScriptedEngine(), otlp_endpoint=receiver.endpoint, api_keys=(KEY,)) as target:
        for _ in range(CALLS // 20):
            codes = await asyncio.gather(*(call(target, header) for _ in range(20)))
            assert set(codes) == {grpc.StatusCode.UNAUTHENTICATED}
        await target.stub.GetModel(pb.GetModelRequest(), metadata=(("authorization", f"Bearer {KEY}"),))
        await receiver.span("GetModel")


def test_a_limit_fills_up_again_but_never_beyond_a_second() -> None:
    now = 0.0
    limit = RateLimit(10, lambda: now)
    assert [limit.take() for _ in range(12)] == [True] * 10 + [False] * 2
    now = 0.25
    assert [limit.take() for _ in range(3)] == [True, True, False]
    limit.give_back()
    assert [limit.take(), limit.take()] == [True, False]
    now = 60.0
    limit.give_back()
    assert [limit.take() for _ in range(11)] == [True] * 10 + [False]
