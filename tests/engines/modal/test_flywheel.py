"""The flywheel engine, over the real client of Modal and real containers: what it sends, what it takes, what it cancels."""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.engines.base import Event, Started
from flywheel_server.engines.modal import engine as modal_engine
from flywheel_server.engines.modal.received_events import events_of
from flywheel_server.engines.scripted import Script
from flywheel_server.messages import GenerationResponseSample
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpclib import Status

from tests.modal_cloud import ModalCloud, scripted
from tests.modal_cloud.cancelling import cancel_at_random, short_looks
from tests.server.test_errors import details_of
from tests.serving import Target, code_of, connected, drained, serving, through_a_cable, until
from tests.thorough import further

METHODS = ["Generate", "GenerateDeltas", "GenerateAll"]
ROOT = Path(__file__).parent.parent.parent.parent
APP = "scripted"
SLOW = "slow"
TEXT = "The llama 🦙 is a domesticated South American camelid. "


@pytest.fixture(scope="module")
def deployed(cloud: ModalCloud) -> ModalCloud:
    scripted.deploy(cloud, APP)
    return cloud


@pytest.fixture(scope="module")
def slow(cloud: ModalCloud) -> ModalCloud:
    scripted.deploy(cloud, SLOW, Script(token_delay=0.01))
    return cloud


@pytest.fixture(params=["Model", "Flywheel"])
async def target(deployed: ModalCloud, request: pytest.FixtureRequest) -> AsyncIterator[Target]:
    async with serving(scripted.engine(APP, request.param)) as target:
        yield target


def request(**fields: Any) -> pb.GenerationRequest:
    return pb.GenerationRequest(**{"text": "hello", "max_tokens": 12, **fields})


async def test_all_three_methods_bring_all_samples(target: Target) -> None:
    whole = [sample async for sample in target.stub.Generate(request(num_samples=3))]
    deltas = [delta async for delta in target.stub.GenerateDeltas(request(num_samples=3))]
    response = await target.stub.GenerateAll(request(num_samples=3))
    expected = TEXT.encode()[:48].decode()
    assert sorted((sample.index, sample.text, sample.prompt_tokens) for sample in whole) == [(i, expected, 2) for i in range(3)]
    assert [(sample.index, sample.text) for sample in response.responses] == [(i, expected) for i in range(3)]
    for index in range(3):
        assert "".join(delta.text for delta in deltas if delta.index == index) == expected


async def test_deltas_come_while_they_are_made(slow: ModalCloud) -> None:
    async with serving(scripted.engine(SLOW)) as target:
        call = target.stub.GenerateDeltas(request(max_tokens=2000))
        assert (await call.read()).text
        assert await scripted.running(SLOW) == 1
        call.cancel()
        await until(lambda: nothing_runs(slow), "the call has ended")


def nothing_runs(cloud: ModalCloud) -> bool:
    return all(call.state not in {"pending", "running"} for call in cloud.calls)


async def some_running() -> bool:
    return await scripted.running(SLOW) > 0


async def none_running() -> bool:
    return await scripted.running(SLOW) == 0


async def test_the_eleven_fields_arrive_and_the_options_too(deployed: ModalCloud) -> None:
    fields = request(
        num_samples=2,
        eos_token_ids=[4],
        max_input_tokens=1,
        stop=["South"],
        temperature=0.0,
        top_k=0,
        top_p=0.5,
        presence_penalty=-1.0,
        frequency_penalty=1.0,
    )
    # `Flywheel.generate` takes exactly the eleven as keywords.
    for class_name in ("Model", "Flywheel"):
        async with serving(scripted.engine(APP, class_name)) as target:
            response = await target.stub.GenerateAll(fields)
        assert [sample.text for sample in response.responses] == [TEXT.encode()[:16].decode()] * 2
        assert response.prompt_tokens == 1
        container = deployed.calls[-1].container
        assert container is not None
        assert container.definition.resources.gpu_config.gpu_type == "A10G"
        assert container.definition.timeout_secs == 600


async def test_stats_are_those_of_modal(deployed: ModalCloud) -> None:
    async with serving(scripted.engine(APP)) as target:
        deployed.set_stats(7, 3)
        try:
            stats = await target.stub.GetStats(pb.GetStatsRequest())
        finally:
            deployed.set_stats(None)
        assert (stats.backlog, stats.num_total_runners) == (7, 3)


async def cancelled(target: Target, method: str, begun: asyncio.Event) -> None:
    call = getattr(target.stub, method)(request(max_tokens=2000))
    reading = asyncio.create_task(drained(call))
    await begun.wait()
    call.cancel()
    await asyncio.gather(reading, return_exceptions=True)


@pytest.mark.parametrize("method", [METHODS[1], *further(METHODS, but=METHODS[1:2])])
@pytest.mark.parametrize("how", ["cancel", "deadline", "cut"])
@pytest.mark.parametrize("class_name", ["Model", "Flywheel"])
async def test_a_caller_that_goes_away_ends_its_call_on_modal(slow: ModalCloud, class_name: str, how: str, method: str) -> None:
    async with serving(scripted.engine(SLOW, class_name)) as direct, through_a_cable(direct.address) as cable:
        before = len(slow.calls)
        async with connected(cable.address) as target:
            call = getattr(target.stub, method)(request(max_tokens=2000), timeout=1 if how == "deadline" else None)
            reading = asyncio.create_task(drained(call))
            await until(lambda: any(made.state == "running" for made in slow.calls[before:]), "the call runs", within=20)
            if how == "cancel":
                call.cancel()
            if how == "cut":
                cable.cut()
            await asyncio.gather(reading, return_exceptions=True)
        (made,) = slow.calls[before:]
        await until(lambda: made.id in slow.cancelled, "the cancel has reached Modal")
        await until(lambda: made.state == "cancelled", "the call has ended on Modal")
        await until(lambda: idle(direct), "the server is idle")
    await until(none_running, "the class works on nothing")


async def idle(target: Target) -> bool:
    stats = await target.stub.GetStats(pb.GetStatsRequest())
    return (stats.active, stats.queued) == (0, 0)


@pytest.mark.thorough
async def test_nothing_is_left_of_calls_cancelled_at_random(slow: ModalCloud) -> None:
    """`python -m tests.modal_cloud.cancelling` does the same with 10,000 calls, on busy cores."""
    async with serving(scripted.engine(SLOW)) as target:
        await target.stub.GetStats(pb.GetStatsRequest())
        with short_looks():
            left = await cancel_at_random(target, slow, SLOW, 300)
    assert left.nothing, left


async def test_a_stopping_server_cancels_what_it_cannot_finish(slow: ModalCloud) -> None:
    begun = len(slow.calls)
    async with serving(scripted.engine(SLOW)) as target:
        call = target.stub.GenerateDeltas(request(max_tokens=3000))
        await call.read()
    await until(lambda: nothing_runs(slow), "no call is left on Modal", within=5)
    assert slow.calls[begun].state == "cancelled"


async def test_a_call_whose_class_ends_a_sample_twice_is_cancelled(slow: ModalCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = GenerationResponseSample(text="", generated_tokens=1, finished=1.0, finish_reason="stop", index=0)

    async def events(*arguments: Any) -> AsyncIterator[Event]:
        async for event in events_of(*arguments):
            yield event
            if isinstance(event, Started):
                yield sample
                yield sample

    monkeypatch.setattr(modal_engine, "events_of", events)
    begun = len(slow.calls)
    async with serving(scripted.engine(SLOW)) as target:
        call = target.stub.GenerateDeltas(request(max_tokens=3000, num_samples=2))
        assert await code_of(call) is grpc.StatusCode.INTERNAL
        await until(
            lambda: slow.calls[begun].state == "cancelled",
            "the call is cancelled",
            within=10,
        )


async def failure(target: Target, text: str, method: str) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await drained(getattr(target.stub, method)(request(text=text)))
    assert "SECRET" not in str(caught.value)
    return caught.value


FAULTS = [
    ("raise", grpc.StatusCode.INTERNAL, ErrorInfo),
    ("raise what cannot be unpickled", grpc.StatusCode.INTERNAL, ErrorInfo),
    ("exit", grpc.StatusCode.INTERNAL, ErrorInfo),
    ("raise TimeoutError", grpc.StatusCode.INTERNAL, ErrorInfo),
    ("raise CancelledError", grpc.StatusCode.UNAVAILABLE, RetryInfo),
    ("too long", grpc.StatusCode.INVALID_ARGUMENT, BadRequest),
    ("hang", grpc.StatusCode.DEADLINE_EXCEEDED, ErrorInfo),
    ("nothing", grpc.StatusCode.INTERNAL, ErrorInfo),
    ("no samples", grpc.StatusCode.INTERNAL, ErrorInfo),
    ("half a sample", grpc.StatusCode.INTERNAL, ErrorInfo),
    ("a wrong type", grpc.StatusCode.INTERNAL, ErrorInfo),
]


@pytest.mark.parametrize(("class_name", "method"), [("Faulty", "GenerateAll"), ("FaultyStream", "GenerateDeltas")])
async def test_what_the_class_does_wrong_has_its_status(
    deployed: ModalCloud, monkeypatch: pytest.MonkeyPatch, class_name: str, method: str
) -> None:
    monkeypatch.setattr("flywheel_server.engines.modal.received_events.LAST_EVENTS_TIMEOUT", 0.2)
    async with serving(scripted.engine(APP, class_name, timeout=1)) as target:
        for text, code, detail in FAULTS:
            error = await failure(target, text, method)
            assert error.code() is code, text
            assert detail in details_of(error), text
        if class_name == "FaultyStream":
            for text in ("nothing of this kind", "return no receipt"):
                assert (await failure(target, text, method)).code() is grpc.StatusCode.INTERNAL, text
            for text in ("leave a gap", "lose the end", "begin anew too late"):
                error = await failure(target, text, method)
                assert (error.code(), RetryInfo in details_of(error)) == (grpc.StatusCode.UNAVAILABLE, True), text
            assert (await target.stub.GenerateAll(request(text="begin anew"))).responses[0].text == "new"
            assert (await target.stub.GenerateAll(request(text="send everything twice"))).responses[0].text == "SECRET"
            messages = [message async for message in target.stub.GenerateDeltas(request(text="begin anew"))]
            assert "".join(message.text for message in messages) == "new"
        else:
            assert (await target.stub.GenerateAll(request(text="leave the stop sequence in"))).num_samples == 1


@pytest.mark.parametrize("form", ["json", *further(["text"])])
def test_the_log_has_neither_the_token_nor_what_the_class_said(deployed: ModalCloud, form: str) -> None:
    program = """
import asyncio, sys
from flywheel_server import logs
from flywheel_proto.v1 import generation_pb2 as pb
from tests.modal_cloud import scripted
from tests.serving import drained, serving

async def main():
    for class_name in ("Faulty", "FaultyStream", "Model"):
        async with serving(scripted.engine(sys.argv[2], class_name)) as target:
            for method in ("Generate", "GenerateDeltas"):
                try:
                    await drained(getattr(target.stub, method)(pb.GenerationRequest(text="raise", max_tokens=3)))
                except Exception:
                    pass

logs.configure("debug", sys.argv[1])
asyncio.run(main())
"""
    environ = {**os.environ, **deployed.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, "-c", program, form, APP], capture_output=True, text=True, check=True, env=environ, cwd=ROOT
    )
    assert "raised ValueError" in ran.stderr
    for secret in ("SECRET", deployed.environ["MODAL_TOKEN_SECRET"]):
        assert secret not in ran.stderr


@pytest.mark.thorough
async def test_each_reason_why_the_class_cannot_be_called_has_its_status(deployed: ModalCloud) -> None:
    async def refused(status: Status | None = None, app: str = APP, class_name: str = "Model") -> grpc.aio.AioRpcError:
        deployed.disturb(status=status)
        try:
            async with serving(scripted.engine(app, class_name), health_interval=30) as target:
                return await failure(target, "hello", "Generate")
        finally:
            deployed.calm()

    for status, code, setting in (
        (Status.NOT_FOUND, grpc.StatusCode.FAILED_PRECONDITION, "FLYWHEEL_MODAL_APP"),
        (Status.PERMISSION_DENIED, grpc.StatusCode.FAILED_PRECONDITION, "FLYWHEEL_MODAL_ENVIRONMENT"),
        (Status.UNAUTHENTICATED, grpc.StatusCode.FAILED_PRECONDITION, "MODAL_TOKEN_ID"),
        (Status.RESOURCE_EXHAUSTED, grpc.StatusCode.RESOURCE_EXHAUSTED, None),
        (Status.UNAVAILABLE, grpc.StatusCode.UNAVAILABLE, None),
        (Status.INTERNAL, grpc.StatusCode.UNAVAILABLE, None),
    ):
        error = await refused(status)
        assert error.code() is code, status
        details = details_of(error)
        if setting:
            assert details[ErrorInfo].reason == "ENGINE_NOT_SET_UP"
            assert details[ErrorInfo].metadata == {"app": APP, "class": "Model", "environment": "", "setting": setting}
        else:
            assert RetryInfo in details
    for app, class_name in (("no-such-app", "Model"), (APP, "NoSuchClass")):
        error = await refused(app=app, class_name=class_name)
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert f"class {class_name} of app {app}" in str(error.details())


async def test_a_class_that_leaves_the_stop_sequence_in_does_not_get_it_past_the_server(deployed: ModalCloud) -> None:
    async with serving(scripted.engine(APP, "Faulty")) as target:
        response = await target.stub.GenerateAll(request(text="leave the stop sequence in", stop=["END"]))
    (sample,) = response.responses
    assert (sample.text, sample.stop_sequence) == ("one ", "END")


async def test_a_server_without_its_class_is_not_healthy(deployed: ModalCloud) -> None:
    async with serving(scripted.engine("no-such-app")) as target:
        health = health_pb2_grpc.HealthStub(target.channel)
        found = await health.Check(health_pb2.HealthCheckRequest())
        assert found.status == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_a_refusal_passes(deployed: ModalCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine works again as soon as Modal no longer refuses it, whether it had found the class before or not."""
    monkeypatch.setattr("flywheel_server.engines.modal.inbox.QUEUE_CREATE_TIMEOUT", 0.5)
    monkeypatch.setattr("flywheel_server.engines.modal.retries.FIRST_DELAY", 0.05)
    for status in (Status.UNAVAILABLE, Status.UNAUTHENTICATED, Status.NOT_FOUND):
        async with serving(scripted.engine(APP), health_interval=30) as target:
            for _ in range(2):
                deployed.disturb(status=status)
                with pytest.raises(grpc.aio.AioRpcError):
                    await drained(target.stub.GenerateDeltas(request()))
                deployed.calm()
                await drained(target.stub.GenerateDeltas(request()))


async def test_the_control_plane_goes_down_and_comes_back(slow: ModalCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flywheel_server.engines.modal.reachability.CONFIRMATION_SECONDS", 1.0)
    async with serving(scripted.engine(SLOW), health_interval=0.2) as target:
        health = health_pb2_grpc.HealthStub(target.channel)

        async def is_serving() -> bool:
            found = await health.Check(health_pb2.HealthCheckRequest())
            return bool(found.status == health_pb2.HealthCheckResponse.SERVING)

        async def is_not_serving() -> bool:
            return not await is_serving()

        await until(is_serving, "it is serving")
        stream = target.stub.GenerateDeltas(request(max_tokens=3000))
        messages = aiter(stream)
        await anext(messages)
        stream_call = slow.calls[-1]
        slow.down()
        try:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await target.stub.GenerateAll(request())
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert RetryInfo in details_of(caught.value)
            await until(is_not_serving, "it is not serving")
            # The caller of the stream may wait until the control plane is back.
            assert not stream.done()
            stream.cancel()
            assert stream_call.id not in slow.cancelled
        finally:
            slow.up()
        await until(is_serving, "it is serving again")
        await until(lambda: stream_call.id in slow.cancelled, "the cancel arrives late rather than never")
        assert (await target.stub.GenerateAll(request())).num_samples == 1
