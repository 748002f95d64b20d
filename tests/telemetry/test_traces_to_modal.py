"""The trace of a call goes on to the class on Modal, if the class takes it."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from flywheel_client import AsyncClient
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.engines.modal import remote_class
from flywheel_server.engines.modal.remote_fields import TRACE_ARGUMENT, fields_of, refuses_trace
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from tests.modal_cloud import ModalCloud, scripted
from tests.serving import code_of, serving, until
from tests.telemetry.otlp_receiver import Receiver, receiving
from tests.thorough import further

APP = "traced"
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
SAMPLED = (("traceparent", f"00-{TRACE_ID}-00f067aa0ba902b7-01"),)


@pytest.fixture(scope="module")
async def receiver(cloud: ModalCloud) -> AsyncIterator[Receiver]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
        async with receiving() as receiver:
            scripted.deploy(cloud, APP, receiver=receiver.endpoint)
            yield receiver


def request(**fields: Any) -> pb.GenerationRequest:
    return pb.GenerationRequest(**{"text": "hello", "max_tokens": 5, **fields})


async def test_a_call_is_one_trace_from_the_client_through_the_server_to_the_engine(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider = TracerProvider(resource=Resource({"service.name": "caller", "service.instance.id": "1"}), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(receiver.endpoint)))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    async with serving(scripted.engine(APP), otlp_endpoint=receiver.endpoint) as target:
        with provider.get_tracer("caller").start_as_current_span("work") as work:
            async with AsyncClient(target.address) as client:
                assert [delta async for delta in client.generate_deltas("hello", max_tokens=5)]
    await asyncio.to_thread(provider.shutdown)
    trace_id = trace.format_trace_id(work.get_span_context().trace_id)
    names = {"work": "caller", "client": "caller", "server": "flywheel-server", "model": "flywheel-model"}

    def spans() -> dict[str, Span]:
        kinds = {("caller", Span.SPAN_KIND_INTERNAL): "work", ("caller", Span.SPAN_KIND_CLIENT): "client"}
        kinds |= {(names[kind], Span.SPAN_KIND_SERVER): kind for kind in ("server", "model")}
        return {
            kinds[resource["service.name"], span.kind]: span
            for span, resource in receiver.spans
            if span.trace_id.hex() == trace_id
        }

    await until(lambda: spans().keys() == names.keys(), "all spans have arrived")
    found = spans()
    assert not found["work"].parent_span_id
    for child, parent in (("client", "work"), ("server", "client"), ("model", "server")):
        assert found[child].parent_span_id == found[parent].span_id, child


async def test_the_models_span_is_a_child_of_the_servers(receiver: Receiver) -> None:
    receiver.spans.clear()
    async with serving(scripted.engine(APP), otlp_endpoint=receiver.endpoint) as target:
        assert await code_of(target.stub.GenerateDeltas(request(), metadata=SAMPLED)) is grpc.StatusCode.OK
        await target.stub.Tokenize(pb.TokenizeRequest(text="hello"), metadata=SAMPLED)
        server, model = await receiver.span("GenerateDeltas"), await receiver.span("Model.generate_deltas")
        tokenized = await receiver.span("Model.tokenize")
    assert model.trace_id.hex() == server.trace_id.hex() == TRACE_ID
    assert model.parent_span_id == server.span_id
    assert model.kind == Span.SPAN_KIND_SERVER
    assert [event.name for event in model.events] == ["started", "first token"]
    assert receiver.resource_of(model)["service.name"] == "flywheel-model"
    assert tokenized.trace_id.hex() == TRACE_ID


async def test_an_error_of_the_model_is_in_its_span(receiver: Receiver) -> None:
    async with serving(scripted.engine(APP), otlp_endpoint=receiver.endpoint) as target:
        call = target.stub.GenerateDeltas(request(max_tokens=8000, text=1000 * "hello"))
        assert await code_of(call) is grpc.StatusCode.INVALID_ARGUMENT
        model = await receiver.span("Model.generate_deltas", error_type="PromptTooLongError")
    assert (model.status.code, model.status.message) == (Status.STATUS_CODE_ERROR, "PromptTooLongError")


@pytest.mark.parametrize("class_name", ["Flywheel", *further(["Untold"])])
async def test_a_class_that_takes_no_trace_goes_on(class_name: str, receiver: Receiver) -> None:
    async with serving(scripted.engine(APP, class_name), otlp_endpoint=receiver.endpoint) as target:
        response = await target.stub.GenerateAll(request(), metadata=SAMPLED)
    assert response.responses[0].text


async def test_a_class_that_was_deployed_again_without_it_is_looked_up_again(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def as_before(method: Any) -> frozenset[str]:
        monkeypatch.setattr(remote_class, "fields_of", fields_of)
        return await fields_of(method) | {TRACE_ARGUMENT}

    monkeypatch.setattr(remote_class, "fields_of", as_before)
    async with serving(scripted.engine(APP, "Flywheel"), otlp_endpoint=receiver.endpoint) as target:
        assert await code_of(target.stub.GenerateAll(request())) is grpc.StatusCode.UNAVAILABLE
        assert await code_of(target.stub.GenerateAll(request())) is grpc.StatusCode.OK


def test_only_an_error_about_the_trace_refuses_it() -> None:
    assert refuses_trace(ValueError("trace_headers: Extra inputs are not permitted; scratch: Extra inputs are not permitted"))
    assert refuses_trace(TypeError("generate() got an unexpected keyword argument 'trace_headers'"))
    assert not refuses_trace(TypeError("generate() got an unexpected keyword argument 'seed'"))
    assert not refuses_trace(ValueError("the text has trace_headers"))
    assert not refuses_trace(None)
