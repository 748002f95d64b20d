"""Spans of calls, as a receiver of OTLP gets them."""

import asyncio
import json
import socket
import time
from typing import Any

import grpc
import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.engines.scripted import Script, ScriptedEngine
from flywheel_server.telemetry.otlp import STOP_TIMEOUT
from grpc_health.v1 import health_pb2, health_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from tests.server.test_command import SCRIPTED, command, ready_line
from tests.serving import Target, code_of, connected, serving, until
from tests.telemetry.otlp_receiver import Receiver, attributes_of
from tests.thorough import further

pytestmark = pytest.mark.usefixtures("spans_soon")

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT_ID = "00f067aa0ba902b7"
SAMPLED = ("traceparent", f"00-{TRACE_ID}-{PARENT_ID}-01")
PROMPT = "a private prompt"
SERVICE = "flywheel.v1.GenerationService"


def request(**fields: Any) -> pb.GenerationRequest:
    return pb.GenerationRequest(**{"text": PROMPT, "max_tokens": 5, **fields})


def event_times(span: Span) -> dict[str, int]:
    return {event.name: event.time_unix_nano for event in span.events}


async def test_a_call_is_one_span_of_the_callers_trace(receiver: Receiver) -> None:
    before = time.time_ns()
    engine = ScriptedEngine(Script(prompt_delay=0.03, token_delay=0.01))
    async with serving(engine, otlp_endpoint=receiver.endpoint) as target:
        await code_of(target.stub.GenerateDeltas(request(num_samples=2, temperature=0.5), metadata=(SAMPLED,)))
        span = await receiver.span("GenerateDeltas")
    assert span.name == f"{SERVICE}/GenerateDeltas"
    assert span.kind == Span.SPAN_KIND_SERVER
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE_ID, PARENT_ID)
    assert span.status.code == Status.STATUS_CODE_UNSET
    attributes = attributes_of(span)
    assert attributes["rpc.system.name"] == "grpc"
    assert attributes["rpc.response.status_code"] == "OK"
    assert attributes["gen_ai.operation.name"] == "text_completion"
    assert attributes["gen_ai.request.temperature"] == pytest.approx(0.5)
    assert attributes["gen_ai.request.choice.count"] == 2
    assert attributes["gen_ai.usage.output_tokens"] == 10
    assert attributes["gen_ai.response.finish_reasons"] == ["length", "length"]
    assert attributes["network.peer.address"] == "127.0.0.1"
    assert PROMPT not in str(span)
    times = event_times(span)
    assert list(times) == ["queued", "admitted", "started", "first token", "finished"]
    assert [event.name for event in span.events].count("finished") == 2
    moments = [before, span.start_time_unix_nano, *times.values(), span.end_time_unix_nano, time.time_ns()]
    assert moments == sorted(moments)
    assert times["first token"] - times["started"] >= 9e6
    assert times["finished"] - times["first token"] >= 35e6


async def test_the_resource_names_the_server_and_the_environment_wins(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flywheel_proto import __version__

    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=staging")
    async with serving(ScriptedEngine(), otlp_endpoint=receiver.endpoint) as target:
        await target.stub.GetStats(pb.GetStatsRequest())
        resource = receiver.resource_of(await receiver.span("GetStats"))
    assert (resource["service.name"], resource["service.version"]) == ("flywheel-server", __version__)
    assert resource["deployment.environment.name"] == "staging"
    assert resource["service.instance.id"]
    monkeypatch.setenv("OTEL_SERVICE_NAME", "other")
    async with serving(ScriptedEngine(), otlp_endpoint=receiver.endpoint) as target:
        await target.stub.GetModel(pb.GetModelRequest())
        assert receiver.resource_of(await receiver.span("GetModel"))["service.name"] == "other"


async def test_what_the_caller_does_not_sample_is_not_sent(receiver: Receiver) -> None:
    unsampled = (("traceparent", f"00-{TRACE_ID}-{PARENT_ID}-00"),)
    async with serving(ScriptedEngine(), otlp_endpoint=receiver.endpoint) as target:
        await target.stub.GenerateAll(request(), metadata=unsampled)
        await target.stub.GetStats(pb.GetStatsRequest())
        span = await receiver.span("GetStats")
    assert not span.parent_span_id
    assert [span.name for span, _ in receiver.spans] == [f"{SERVICE}/GetStats"]


async def cancelled(target: Target, **fields: Any) -> None:
    call = target.stub.GenerateDeltas(request(**fields))
    await call.read()
    call.cancel()


async def test_each_end_of_a_call_has_its_status(receiver: Receiver) -> None:
    engine = ScriptedEngine(Script(token_delay=0.01, fail_after=20))
    async with serving(engine, otlp_endpoint=receiver.endpoint) as target:
        await code_of(target.stub.GenerateAll(request(max_tokens=0)))
        await code_of(target.stub.Generate(request(max_tokens=200), timeout=0.1))
        await code_of(target.stub.GenerateDeltas(request(max_tokens=200)))
        await cancelled(target, max_tokens=200)
        refused = await receiver.span("GenerateAll", rpc_response_status_code="INVALID_ARGUMENT")
        late = await receiver.span("Generate", rpc_response_status_code="DEADLINE_EXCEEDED")
        failed = await receiver.span("GenerateDeltas", rpc_response_status_code="INTERNAL")
        left = await receiver.span("GenerateDeltas", rpc_response_status_code="CANCELLED")
    assert refused.status.code == left.status.code == Status.STATUS_CODE_UNSET
    assert (late.status.code, late.status.message) == (Status.STATUS_CODE_ERROR, "IN_GENERATION")
    assert (failed.status.code, failed.status.message) == (Status.STATUS_CODE_ERROR, "ENGINE_FAILED")
    assert attributes_of(failed)["error.type"] == "INTERNAL"
    assert attributes_of(left)["flywheel.phase"] == "decode"
    assert PROMPT not in str([span for span, _ in receiver.spans])


async def test_texts_are_sent_if_asked_for(receiver: Receiver) -> None:
    async with serving(ScriptedEngine(), otlp_endpoint=receiver.endpoint, trace_prompts=True) as target:
        response = await target.stub.GenerateAll(request())
        attributes = attributes_of(await receiver.span("GenerateAll"))
    (prompt,) = json.loads(attributes["gen_ai.input.messages"])
    assert prompt == {"role": "user", "parts": [{"type": "text", "content": PROMPT}]}
    (sample,) = json.loads(attributes["gen_ai.output.messages"])
    assert sample == {"role": "assistant", "parts": [{"type": "text", "content": response.responses[0].text}]}


async def test_a_call_of_a_method_that_does_not_exist_has_its_id_and_no_address(receiver: Receiver) -> None:
    async with serving(ScriptedEngine(), otlp_endpoint=receiver.endpoint) as target:
        unknown: Any = target.channel.unary_unary(f"/{SERVICE}/Nonsense")
        assert await code_of(unknown(b"", metadata=(("x-request-id", "id-1"),))) is grpc.StatusCode.UNIMPLEMENTED
        attributes = attributes_of(await receiver.span("_OTHER"))
    assert attributes["flywheel.request_id"] == "id-1"
    assert "network.peer.address" not in attributes


HOSTILE = [
    ("traceparent", "00-" + "f" * 4000),
    ("tracestate", ",".join(f"k{number}=v" for number in range(400))),
    ("baggage", "a=" + "b" * 3000),
    ("traceparent", SAMPLED[1]),
    ("x-request-id", "r" * 2000),
]


async def test_hostile_metadata_do_no_harm(receiver: Receiver) -> None:
    async with serving(ScriptedEngine(), otlp_endpoint=receiver.endpoint, max_header_bytes=16384) as target:
        for name, value in HOSTILE:
            await target.stub.GetStats(pb.GetStatsRequest(), metadata=((name, value),))
        await until(lambda: len(receiver.spans) == len(HOSTILE), "all spans")
    for span, _ in receiver.spans:
        assert len(span.SerializeToString()) < 2000


async def test_invalid_headers_of_strangers_are_not_in_the_log(receiver: Receiver) -> None:
    invalid = (
        *HOSTILE,
        ("tracestate", "a=" + "x" * 2000),
        ("tracestate", "a=1,a=2"),
        ("traceparent", "f" * 600),
        ("baggage", "nonsense, a=%zz, =b"),
    )
    async with command(*SCRIPTED, f"--otlp-endpoint={receiver.endpoint}", "--log-level=warning") as process:
        _, address = await ready_line(process)
        async with connected(address) as target:
            for header in invalid:
                metadata = (header,) if header[0] == "traceparent" else (SAMPLED, header)
                await target.stub.GetStats(pb.GetStatsRequest(), metadata=metadata)
        process.terminate()
        _, stderr = await process.communicate()
    assert stderr == b""


async def test_strangers_cause_few_spans_and_probes_none(receiver: Receiver) -> None:
    key = "k" * 32
    async with serving(ScriptedEngine(), otlp_endpoint=receiver.endpoint, api_keys=(key,)) as target:
        begun = time.monotonic()
        for _ in range(60):
            assert await code_of(target.stub.GetStats(pb.GetStatsRequest())) is grpc.StatusCode.UNAUTHENTICATED
        seconds = int(time.monotonic() - begun) + 2
        await health_pb2_grpc.HealthStub(target.channel).Check(health_pb2.HealthCheckRequest())
        await target.stub.GetStats(pb.GetStatsRequest(), metadata=(("authorization", f"Bearer {key}"),))
        await receiver.span("GetStats", rpc_response_status_code="OK")
    assert {span.name for span, _ in receiver.spans} == {f"{SERVICE}/GetStats"}
    assert 1 < len(receiver.spans) <= 1 + 10 * seconds


@pytest.mark.parametrize("answers", ["nothing answers", *further(["nothing listens"])])
async def test_a_receiver_out_of_reach_delays_neither_calls_nor_the_end(answers: str) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if answers == "nothing answers":
            listener.listen()
        endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
        async with asyncio.timeout(30):
            async with serving(ScriptedEngine(), otlp_endpoint=endpoint) as target:
                for _ in range(20):
                    await target.stub.GenerateAll(request())
                left = time.monotonic()
            assert time.monotonic() - left < STOP_TIMEOUT + 5


async def test_wrong_variables_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "brotli")
    with pytest.raises(ValueError, match="OTEL_EXPORTER_OTLP_COMPRESSION"):
        async with serving(ScriptedEngine(), otlp_endpoint="http://localhost:4317"):
            pass


async def test_what_is_left_is_sent_at_the_end(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "60000")
    async with serving(ScriptedEngine(), otlp_endpoint=receiver.endpoint) as target:
        await target.stub.GenerateAll(request())
        assert not receiver.spans
    assert [span.name for span, _ in receiver.spans] == [f"{SERVICE}/GenerateAll"]
