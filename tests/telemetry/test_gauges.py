"""Figures that are read when the metrics are scraped, over the wire."""

import asyncio
import logging
import os
import time
from contextlib import AsyncExitStack
from dataclasses import replace

import grpc
import pytest
from flywheel_proto import __version__
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server import gauges, supervision
from flywheel_server.engines.base import EngineModel, EngineStats, PreparedRequest
from flywheel_server.engines.scripted import Script, ScriptedEngine
from flywheel_server.messages import GenerationRequest
from flywheel_server.system.output import Output

from tests.server.test_supervision import MortalEngine
from tests.serving import code_of, connected, serving, until
from tests.telemetry.logged import logging_to_output
from tests.telemetry.values import free_address, scraped, until_scraped

LONG = pb.GenerationRequest(text="x", max_tokens=8000)


class SmallEngine(ScriptedEngine):
    """Has two slots, in which each call holds 30 of 100 tokens of context, and a cache."""

    def __init__(self) -> None:
        super().__init__(Script(token_delay=0.01))
        self.answers = asyncio.Event()
        self.answers.set()

    async def prepare(self, request: GenerationRequest) -> PreparedRequest:
        return replace(await super().prepare(request), context_tokens=30)

    async def stats(self) -> EngineStats:
        await self.answers.wait()
        return EngineStats(backlog=7, num_total_runners=3, cached_prompt_tokens=41)

    def model(self) -> EngineModel:
        return replace(super().model(), slots=2, shared_context_tokens=100)


async def test_slots_queue_and_context_are_shown_as_they_are() -> None:
    address = free_address()
    async with serving(SmallEngine(), metrics_address=address, max_queued=5) as target:
        idle = await scraped(address)
        assert (idle["flywheel_max_concurrent"], idle["flywheel_max_queued"], idle["flywheel_context_tokens"]) == (2, 5, 100)
        assert (idle["flywheel_samples_active"], idle["flywheel_context_tokens_reserved"]) == (0, 0)
        build = f'flywheel_build_info{{engine="scripted",model="script",version="{__version__}"}}'
        assert idle[build] == 1
        assert (idle["flywheel_engine_up"], idle["flywheel_engine_restarts_total"]) == (1, 0)
        calls = [target.stub.GenerateDeltas(LONG) for _ in range(5)]
        busy = {
            "flywheel_calls_active": 2,
            "flywheel_calls_queued": 3,
            "flywheel_samples_active": 2,
            "flywheel_samples_queued": 3,
            "flywheel_context_tokens_reserved": 60,
            "flywheel_connections": 1,
        }
        await until_scraped(address, busy)
        for call in calls:
            call.cancel()
        await until_scraped(address, dict.fromkeys(list(busy)[:-1], 0))


async def test_an_engine_is_asked_how_busy_it_is_but_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gauges, "STATS_TIMEOUT", 0.1)
    address = free_address()
    engine = SmallEngine()
    async with serving(engine, metrics_address=address):
        values = await scraped(address)
        assert (values["flywheel_engine_backlog"], values["flywheel_engine_runners"]) == (7, 3)
        assert values["flywheel_prompt_tokens_cached_total"] == 41
        engine.answers.clear()
        values = await scraped(address)
        assert values.keys().isdisjoint({"flywheel_engine_backlog", "flywheel_engine_runners"})
        assert values["flywheel_prompt_tokens_cached_total"] == 41, "a counter stays"
        assert values["flywheel_engine_up"] == 1


async def test_an_engine_that_counts_no_cached_tokens_has_no_such_metric() -> None:
    address = free_address()
    async with serving(ScriptedEngine(), metrics_address=address):
        values = await scraped(address)
        assert "flywheel_prompt_tokens_cached_total" not in values
        assert "flywheel_context_tokens" not in values


async def test_deaths_of_the_engine_are_seen_and_restarts_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "RESTART_INTERVAL", 0.01)
    monkeypatch.setattr(supervision, "MIN_RESTART_PAUSE", 0.01)
    address = free_address()
    engine = MortalEngine()
    async with serving(engine, metrics_address=address) as target:
        for restarts in (1, 2):
            engine.may_start.clear()
            engine.dead.set()
            assert await code_of(target.stub.GenerateAll(LONG)) is not grpc.StatusCode.OK
            await until_scraped(address, {"flywheel_engine_up": 0, "flywheel_engine_restarts_total": restarts - 1})
            engine.may_start.set()
            await until_scraped(address, {"flywheel_engine_up": 1, "flywheel_engine_restarts_total": restarts})


class SlowToStop(ScriptedEngine):
    """Stops only when it may."""

    def __init__(self) -> None:
        super().__init__(Script(token_delay=0.01))
        self.may_stop = asyncio.Event()

    async def __aexit__(self, *exception: object) -> None:
        await self.may_stop.wait()
        await super().__aexit__(*exception)


async def test_calls_that_the_drain_ends_are_counted() -> None:
    address = free_address()
    engine = SlowToStop()
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(serving(engine, metrics_address=address, drain_timeout=0.01))
        # A server that stops would close the channel of its own.
        stops = stack.pop_all()
        target = await stack.enter_async_context(connected(server.address))
        calls = [asyncio.ensure_future(code_of(target.stub.GenerateDeltas(LONG))) for _ in range(3)]
        await until_scraped(address, {"flywheel_calls_active": 3})
        stopping = asyncio.create_task(stops.aclose())
        assert {await call for call in calls} == {grpc.StatusCode.UNAVAILABLE}
        values = await until_scraped(address, {"flywheel_calls_drained_total": 3, "flywheel_calls_active": 0})
        assert values["flywheel_engine_up"] == 0
        engine.may_stop.set()
        await stopping


async def test_connections_are_counted() -> None:
    address = free_address()
    async with serving(ScriptedEngine(), metrics_address=address) as target:
        await target.channel.channel_ready()
        await until_scraped(address, {"flywheel_connections": 1})
        async with AsyncExitStack() as stack:
            for _ in range(2):
                other = await stack.enter_async_context(connected(target.address, ("grpc.use_local_subchannel_pool", 1)))
                await other.channel.channel_ready()
            await until_scraped(address, {"flywheel_connections": 3})
        await until_scraped(address, {"flywheel_connections": 1})


async def test_lines_of_the_log_that_are_dropped_are_counted() -> None:
    reading, writing = os.pipe()
    output = Output(writing)
    os.close(writing)
    os.close(reading)
    address = free_address()
    async with serving(ScriptedEngine(), metrics_address=address):
        with logging_to_output(output):
            for number in range(3):
                logging.getLogger().warning("line %d", number)
            await until(lambda: output.dropped == 3, "nobody reads")
            assert (await scraped(address))["flywheel_log_lines_dropped_total"] == 3


async def test_the_lag_rises_if_the_event_loop_is_blocked() -> None:
    address = free_address()
    async with serving(ScriptedEngine(), metrics_address=address):
        before = await scraped(address)
        time.sleep(0.4)  # noqa: ASYNC251 - to block it
        late = 'flywheel_event_loop_lag_seconds_bucket{le="0.25"}'
        count = "flywheel_event_loop_lag_seconds_count"

        async def was_late() -> bool:
            after = await scraped(address)
            return after[count] - after[late] == before[count] - before[late] + 1

        await until(was_late, "one measurement was later than 0.25 s", within=10)
