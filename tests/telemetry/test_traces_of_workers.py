"""Traces and metrics of a server as it is run: with workers, in its log, and at its end."""

import signal
from collections import Counter

import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.telemetry.otlp_metrics import data_of
from opentelemetry.sdk.resources import Resource
from prometheus_client.parser import text_string_to_metric_families

from tests.serving import free_ports, until
from tests.telemetry.monitored import scraped
from tests.telemetry.otlp_receiver import receiving
from tests.workers.several import several

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
SAMPLED = (("traceparent", f"00-{TRACE_ID}-00f067aa0ba902b7-01"),)


@pytest.mark.thorough
async def test_each_worker_sends_its_own_and_the_log_has_the_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.instance.id=pod")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "60000")
    async with receiving() as receiver, several("--otlp-endpoint", receiver.endpoint, "--log-prompts", "true") as server:
        async with server.connections() as workers:
            for target in workers.values():
                await target.stub.GenerateAll(pb.GenerationRequest(text="hello", max_tokens=3), metadata=SAMPLED)
        await until(lambda: len(server.events("prompt")) == 2, "both calls are in the log")
        assert {line["trace_id"] for line in server.events("prompt")} == {TRACE_ID}
        assert not receiver.spans
        server.process.send_signal(signal.SIGTERM)
        assert await server.closed() == 0
    # `connections` has made further calls.
    instances = [resource["service.instance.id"] for span, resource in receiver.spans if span.trace_id.hex() == TRACE_ID]
    assert len(instances) == len(set(instances)) == 2
    assert all(instance.startswith("pod-") for instance in instances)


@pytest.mark.thorough
async def test_what_is_served_over_http_is_sent_over_otlp_too_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "100")
    (port,) = free_ports(1)
    address = f"127.0.0.1:{port}"
    async with receiving() as receiver, several("--otlp-endpoint", receiver.endpoint, "--metrics-address", address) as server:
        async with server.connections() as workers:
            for target in workers.values():
                await target.stub.GenerateAll(pb.GenerationRequest(text="hello", max_tokens=3))

        def senders() -> Counter[str]:
            return Counter(name for metrics in receiver.metrics.values() for name in metrics)

        data = data_of(text_string_to_metric_families(await scraped(port)), Resource.create(), 0, 1)
        served = {metric.name for metric in data.resource_metrics[0].scope_metrics[0].metrics}
        await until(lambda: served <= senders().keys(), "somebody has sent each metric")
        # A receiver adds up what the processes send.
        assert senders()["flywheel_samples_active"] == senders()["flywheel_max_queued"] == 1
        assert senders()["flywheel_calls_active"] == 2
