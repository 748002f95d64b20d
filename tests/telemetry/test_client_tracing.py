"""Spans of the client, and how they come together with those of the server and of the class on Modal."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from flywheel_client import AsyncClient, Client, FlywheelError
from flywheel_server.engines.scripted import Script, ScriptedEngine
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace import Span as SdkSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from tests.serving import free_ports, serving, until
from tests.telemetry.otlp_receiver import receiving

FIELDS: dict[str, Any] = {"max_tokens": 5}


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """The spans of a provider that this program has."""
    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    yield exporter
    provider.shutdown()


async def the_span(spans: InMemorySpanExporter) -> ReadableSpan:
    await until(lambda: bool(spans.get_finished_spans()), "a span has ended")
    (span,) = spans.get_finished_spans()
    return span


def attributes_of(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


async def test_client_and_server_are_one_trace(spans: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    async with receiving() as receiver, serving(ScriptedEngine(), otlp_endpoint=receiver.endpoint) as target:
        async with AsyncClient(target.address) as client:
            assert [delta async for delta in client.generate_deltas("hello", temperature=0.5, num_samples=2, **FIELDS)]
        server = await receiver.span("GenerateDeltas")
    span = await the_span(spans)
    context = span.get_span_context()
    assert context is not None
    assert span.name == "flywheel.v1.GenerationService/GenerateDeltas"
    assert span.kind is SpanKind.CLIENT
    assert server.kind == Span.SPAN_KIND_SERVER
    assert int.from_bytes(server.trace_id) == context.trace_id
    assert int.from_bytes(server.parent_span_id) == context.span_id
    attributes = attributes_of(span)
    assert attributes["rpc.response.status_code"] == "OK"
    assert attributes["gen_ai.request.temperature"] == pytest.approx(0.5)
    assert (attributes["gen_ai.usage.input_tokens"], attributes["gen_ai.usage.output_tokens"]) == (2, 10)
    assert attributes["gen_ai.response.finish_reasons"] == ("length", "length")
    assert [event.name for event in span.events] == ["first message"]
    assert span.status.status_code is StatusCode.UNSET


async def test_threads_have_the_same_spans(spans: InMemorySpanExporter) -> None:
    async with serving(ScriptedEngine()) as target:
        with Client(target.address) as client:
            await asyncio.to_thread(lambda: [*client.generate("hello", **FIELDS)])
            streamed = await the_span(spans)
            spans.clear()
            await asyncio.to_thread(lambda: client.generate_all("hello", **FIELDS))
            whole = await the_span(spans)
            spans.clear()
            assert await asyncio.to_thread(client.health) == "SERVING"
    for span in (streamed, whole):
        assert attributes_of(span)["gen_ai.usage.output_tokens"] == 5
        assert attributes_of(span)["rpc.response.status_code"] == "OK"
    assert not spans.get_finished_spans()


async def test_the_spans_of_many_prompts_have_the_parent_of_the_iteration(spans: InMemorySpanExporter) -> None:
    current = trace.NonRecordingSpan(trace.SpanContext(1234, 5678, is_remote=True, trace_flags=trace.TraceFlags(1)))

    def iterate(client: Client) -> None:
        with trace.use_span(current):
            assert len(list(client.generate_many(["a", "b"], **FIELDS))) == 2

    async with serving(ScriptedEngine()) as target:
        with Client(target.address) as client:
            await asyncio.to_thread(iterate, client)
        async with AsyncClient(target.address) as async_client:
            with trace.use_span(current):
                assert len([result async for result in async_client.generate_many(["a", "b"], **FIELDS)]) == 2
    parents = [span.parent for span in spans.get_finished_spans()]
    assert [parent and parent.span_id for parent in parents] == [5678] * 4


async def test_no_call_is_made_within_another_one_while_opentelemetry_may_hold_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its locks are not reentrant: a signal handler that makes a call would wait for the call that it has interrupted."""
    refused: list[str] = []

    class Interrupted(SpanProcessor):
        def on_start(self, span: SdkSpan, parent_context: Context | None = None) -> None:
            self._interrupt("start")

        def on_end(self, span: ReadableSpan) -> None:
            self._interrupt("end")

        def _interrupt(self, when: str) -> None:
            with pytest.raises(RuntimeError, match="reentrant call"):
                client.stats()
            with pytest.raises(RuntimeError, match="reentrant call"):
                next(client.generate_many(["hello"], **FIELDS))
            refused.append(when)

    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(Interrupted())
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    async with serving(ScriptedEngine()) as target:
        with Client(target.address) as client:
            await asyncio.to_thread(client.generate_all, "hello", **FIELDS)
            assert refused == ["start", "end"]
            await asyncio.to_thread(lambda: list(client.generate_deltas("hello", **FIELDS)))
            assert refused == ["start", "end"] * 2
            with pytest.raises(FlywheelError):
                await asyncio.to_thread(client.generate_all, "hello", max_tokens=0)
            assert refused == ["start", "end"] * 3


async def test_a_call_that_is_left_or_cancelled_ends_its_span(spans: InMemorySpanExporter) -> None:
    def leave(client: Client) -> None:
        with client.generate_deltas("hello", max_tokens=1000) as stream:
            next(stream)

    def drop(client: Client) -> None:
        next(client.generate_deltas("hello", max_tokens=1000))

    async def leave_async(client: AsyncClient) -> None:
        async with client.generate_deltas("hello", max_tokens=1000) as stream:
            await anext(stream)

    async with serving(ScriptedEngine(Script(token_delay=0.01))) as target, AsyncClient(target.address) as async_client:
        with Client(target.address) as client:
            for go in (leave, drop):
                await asyncio.to_thread(go, client)
                assert attributes_of(await the_span(spans))["rpc.response.status_code"] == "CANCELLED"
                spans.clear()
        await leave_async(async_client)
        assert attributes_of(await the_span(spans))["rpc.response.status_code"] == "CANCELLED"
        spans.clear()
        task = asyncio.create_task(async_client.generate_all("hello", max_tokens=1000))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert attributes_of(await the_span(spans))["error.type"] == "CANCELLED"


async def test_errors_and_retries_are_in_the_span(spans: InMemorySpanExporter) -> None:
    async with serving(ScriptedEngine()) as target, AsyncClient(target.address) as client:
        with pytest.raises(FlywheelError):
            await client.generate_all("hello", max_tokens=0)
        refused = await the_span(spans)
    assert attributes_of(refused)["error.type"] == "INVALID_ARGUMENT"
    assert refused.status.status_code is StatusCode.ERROR
    spans.clear()
    (port,) = free_ports(1)
    with Client(f"127.0.0.1:{port}") as unreachable, pytest.raises(FlywheelError):
        await asyncio.to_thread(lambda: unreachable.generate_all("hello", max_tokens=1, timeout=1.0))
    failed = await the_span(spans)
    assert {event.name for event in failed.events} == {"retry"}
    assert attributes_of(failed)["error.type"] in {"UNAVAILABLE", "DEADLINE_EXCEEDED"}


async def test_without_a_provider_the_current_span_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    current = trace.NonRecordingSpan(trace.SpanContext(1234, 5678, is_remote=True, trace_flags=trace.TraceFlags(1)))
    async with receiving() as receiver, serving(ScriptedEngine(), otlp_endpoint=receiver.endpoint) as target:
        async with AsyncClient(target.address) as client:
            with trace.use_span(current):
                await client.stats()
            # The caller's own headers win.
            own = ("traceparent", f"00-{'a' * 32}-{'b' * 16}-01")
            async with AsyncClient(target.address, metadata=[own]) as other:
                with trace.use_span(current):
                    await other.model()
        span, owned = await receiver.span("GetStats"), await receiver.span("GetModel")
    assert (int.from_bytes(span.trace_id), int.from_bytes(span.parent_span_id)) == (1234, 5678)
    assert owned.trace_id.hex() == "a" * 32


def test_a_program_without_opentelemetry_never_loads_it() -> None:
    code = (
        "import sys, flywheel_client\n"
        "client = flywheel_client.Client('127.0.0.1:1', retry=None)\n"
        "try: client.generate_all('hello', max_tokens=1)\n"
        "except flywheel_client.UnavailableError: pass\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_the_status_of_an_interrupted_call_is_cancelled() -> None:
    from flywheel_client import _tracing

    assert _tracing._code_of(KeyboardInterrupt()) is grpc.StatusCode.CANCELLED
