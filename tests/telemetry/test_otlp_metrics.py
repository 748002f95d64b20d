"""Metrics of prometheus_client, as a receiver of OTLP gets them."""

import asyncio
import signal
import socket
import threading
from contextlib import AsyncExitStack

import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.engines.scripted import Script, ScriptedEngine
from flywheel_server.server import serve
from flywheel_server.settings import Settings
from flywheel_server.telemetry.otlp import Otlp
from opentelemetry.proto.metrics.v1.metrics_pb2 import AGGREGATION_TEMPORALITY_CUMULATIVE
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

from tests.server.test_command import SCRIPTED, command
from tests.serving import connected, free_ports, serving, until
from tests.telemetry.otlp_receiver import attributes_of, receiving


def filled() -> CollectorRegistry:
    registry = CollectorRegistry()
    labels = ["rpc_method", "rpc_response_status_code", "rpc_system_name", "error_type"]
    calls = Histogram("rpc_server_call_duration_seconds", "Calls.", labels, buckets=(0.1, 1.0), registry=registry)
    for seconds in (0.05, 0.5, 0.6, 7.0):
        calls.labels("S/M", "OK", "grpc", "").observe(seconds)
    calls.labels("S/M", "INTERNAL", "grpc", "INTERNAL").observe(0.2)
    Histogram("gen_ai_server_time_to_first_token_seconds", "First.", registry=registry).observe(1)
    Counter("flywheel_calls_refused_total", "Refused.", ["reason"], registry=registry).labels("OVERLOADED").inc(3)
    Gauge("flywheel_calls_active", "Active.", registry=registry).set(4)
    Info("flywheel_build", "Build.", registry=registry).info({"version": "1.0"})
    return registry


async def test_all_kinds_arrive_with_the_names_of_the_conventions() -> None:
    async with receiving() as receiver:
        otlp = Otlp(receiver.endpoint, "flywheel-server")
        otlp.push_metrics(filled())
        await otlp.stop()
        (metrics,) = receiver.metrics.values()
    assert set(metrics) == {
        "rpc.server.call.duration",
        "gen_ai.server.time_to_first_token",
        "flywheel_calls_refused",
        "flywheel_calls_active",
        "flywheel_build",
    }
    calls = metrics["rpc.server.call.duration"]
    assert (calls.unit, calls.description) == ("s", "Calls.")
    assert calls.histogram.aggregation_temporality == AGGREGATION_TEMPORALITY_CUMULATIVE
    points = {attributes_of(point)["rpc.response.status_code"]: point for point in calls.histogram.data_points}
    assert attributes_of(points["OK"]) == {"rpc.method": "S/M", "rpc.response.status_code": "OK", "rpc.system.name": "grpc"}
    assert attributes_of(points["INTERNAL"])["error.type"] == "INTERNAL"
    assert list(points["OK"].explicit_bounds) == [0.1, 1.0]
    assert list(points["OK"].bucket_counts) == [1, 2, 1]
    assert (points["OK"].count, points["OK"].sum) == (4, pytest.approx(8.15))
    assert not points["OK"].HasField("min")
    refused = metrics["flywheel_calls_refused"].sum
    assert refused.is_monotonic
    assert [(attributes_of(point), point.as_double) for point in refused.data_points] == [({"reason": "OVERLOADED"}, 3)]
    assert metrics["flywheel_calls_active"].gauge.data_points[0].as_double == 4
    assert attributes_of(metrics["flywheel_build"].gauge.data_points[0]) == {"version": "1.0"}


async def test_a_metric_without_samples_is_left_out() -> None:
    registry = CollectorRegistry()
    Counter("flywheel_calls_refused_total", "Refused.", ["reason"], registry=registry)
    Gauge("flywheel_key_expiry", "Expiry.", ["caller"], registry=registry)
    Histogram("rpc_server_call_duration_seconds", "Calls.", ["rpc_method"], registry=registry)
    Gauge("flywheel_calls_active", "Active.", registry=registry)
    async with receiving() as receiver:
        otlp = Otlp(receiver.endpoint, "flywheel-server")
        otlp.push_metrics(registry)
        await otlp.stop()
        (metrics,) = receiver.metrics.values()
    assert set(metrics) == {"flywheel_calls_active"}


async def test_nothing_is_refreshed_after_stop_has_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "1")
    refreshed = 0

    async def refresh() -> None:
        nonlocal refreshed
        refreshed += 1

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        otlp = Otlp(f"http://127.0.0.1:{listener.getsockname()[1]}", "flywheel-server")
        otlp.push_metrics(filled(), refresh)
        await until(lambda: refreshed == 1, "the first export")
        await otlp.stop()
        await until(lambda: not any(thread.name == "flywheel-otlp-metrics" for thread in threading.enumerate()), "its end")
    assert refreshed == 1


@pytest.mark.thorough
async def test_a_stop_while_the_receiver_does_not_answer_leaves_no_traceback() -> None:
    environment = {"OTEL_METRIC_EXPORT_INTERVAL": "50"}
    with socket.create_server(("127.0.0.1", 0)) as receiver:
        receiver.setblocking(False)
        endpoint = f"http://127.0.0.1:{receiver.getsockname()[1]}"
        async with command(*SCRIPTED, "--otlp-endpoint", endpoint, environment=environment) as process:
            connection, _ = await asyncio.wait_for(asyncio.get_running_loop().sock_accept(receiver), 30)
            with connection:
                process.send_signal(signal.SIGTERM)
                _, log = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 0
    assert b"stopping" in log
    assert b"Traceback" not in log
    assert b"not exported" not in log


async def test_they_are_sent_at_the_interval_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "20")
    registry = filled()
    count = Counter("more", "More.", registry=registry)
    async with receiving() as receiver:
        workers = [Otlp(receiver.endpoint, "flywheel-server", is_worker=True) for _ in range(2)]
        for worker in workers:
            worker.push_metrics(registry)
        await until(lambda: len(receiver.metrics) == 2, "the metrics of both")
        count.inc()
        latest = receiver.metrics.values
        await until(lambda: all(each["more"].sum.data_points[0].as_double == 1 for each in latest()), "what was counted since")
        await asyncio.gather(*(worker.stop() for worker in workers))


async def test_a_disabled_sdk_sends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    async with receiving() as receiver:
        otlp = Otlp(receiver.endpoint, "flywheel-server")
        otlp.push_metrics(filled())
        with otlp.tracer_provider.get_tracer("t").start_as_current_span("s"):
            pass
        await otlp.stop()
        assert not receiver.metrics
        assert not receiver.spans


@pytest.mark.parametrize("with_endpoint", [False, True])
async def test_a_server_sends_what_its_endpoint_has(with_endpoint: bool) -> None:
    address = {"metrics_address": f"127.0.0.1:{free_ports(1)[0]}"} if with_endpoint else {}
    async with receiving() as receiver:
        async with serving(ScriptedEngine(), otlp_endpoint=receiver.endpoint, **address) as target:
            await target.stub.GenerateAll(pb.GenerationRequest(text="x", max_tokens=3))
            stats = await target.stub.GetStats(pb.GetStatsRequest())
            assert stats.active == 0
        (metrics,) = receiver.metrics.values()
    points = metrics["rpc.server.call.duration"].histogram.data_points
    assert {attributes_of(point)["rpc.method"].rpartition("/")[2]: point.count for point in points} == {
        "GenerateAll": 1,
        "GetStats": 1,
    }
    assert metrics["flywheel_generated_tokens"].sum.data_points[0].as_double == 3
    assert {"flywheel_connections", "flywheel_engine_up", "flywheel_event_loop_lag"} <= metrics.keys()


async def test_the_last_metrics_have_what_the_end_of_the_drain_counted() -> None:
    async with receiving() as receiver, AsyncExitStack() as clients:
        settings = Settings(address="127.0.0.1:0", withdraw_window=0, drain_timeout=0.1, otlp_endpoint=receiver.endpoint)
        async with serve(ScriptedEngine(Script(token_delay=0.02)), settings) as port:
            target = await clients.enter_async_context(connected(f"127.0.0.1:{port}"))
            call = target.stub.GenerateDeltas(pb.GenerationRequest(text="x", max_tokens=5000))
            await call.read()
        (metrics,) = receiver.metrics.values()
    assert metrics["flywheel_calls_drained"].sum.data_points[0].as_double == 1
