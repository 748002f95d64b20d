"""The queue that brings the events of calls on Modal: what it costs, and how calls end or go on if it fails at either end."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import product
from typing import Any

import grpc
import grpc.aio
import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.deployment import outbox
from flywheel_server.deployment.outbox import Outbox, Sender
from flywheel_server.engines.base import EngineUnavailableError, Started, TextDelta
from flywheel_server.engines.modal import inbox, queue_reader, received_events, stray_calls
from flywheel_server.engines.modal.event_batch import EventBatch
from flywheel_server.engines.modal.received_events import ReceivedEvents
from flywheel_server.engines.scripted import Script
from google.rpc.error_details_pb2 import RetryInfo
from grpclib import Status

from fuzz.probe import flywheel_server
from tests.modal_cloud import ModalCloud, scripted
from tests.modal_cloud.faults import Side
from tests.server.test_errors import details_of
from tests.serving import Target, connected, drained, serving, until
from tests.thorough import further

APP = "queued"
TOKENS = 60
# What Modal's client repeats by itself, four times in all.
REPEATED = {Status.UNAVAILABLE, Status.INTERNAL, Status.UNKNOWN, Status.CANCELLED, Status.DEADLINE_EXCEEDED}
REFUSALS = [*((status, None) for status in Status if status is not Status.OK), (Status.RESOURCE_EXHAUSTED, 0.3)]
"""The statuses that Modal may refuse a request with, and after how many seconds it asks for the next try."""
SOME_REFUSALS = [(Status.NOT_FOUND, None), (Status.RESOURCE_EXHAUSTED, 0.3)]
CELLS = [*product(("clients", "containers"), REFUSALS)]
"""The side on which a request is refused, and how."""
SOME_CELLS = [
    *(("clients", refusal) for refusal in SOME_REFUSALS),
    *(("containers", (status, None)) for status in (Status.UNAVAILABLE, Status.DATA_LOSS, Status.RESOURCE_EXHAUSTED)),
]
"""What `make test` tries."""
GATEWAYS = ("QueueGet", "QueuePut", "QueueClear", "QueueHeartbeat")
CONTAINERS = ("QueuePut", "QueueLen")


@pytest.fixture(scope="module")
def deployed(cloud: ModalCloud) -> ModalCloud:
    scripted.deploy(cloud, APP, Script(token_delay=0.02))
    return cloud


@pytest.fixture
def calm(deployed: ModalCloud) -> Iterator[ModalCloud]:
    yield deployed
    deployed.calm()


def request(**fields: Any) -> pb.GenerationRequest:
    return pb.GenerationRequest(**{"text": "hello", "max_tokens": TOKENS, **fields})


async def text_of(target: Target, **fields: Any) -> str:
    """Returns the text of a stream, which it checks against the sample's at its end."""
    return "".join([delta.text async for delta in target.stub.GenerateDeltas(request(**fields))])


def expected(count: int = TOKENS) -> str:
    pieces = Script().pieces(Script().text)
    return "".join(pieces[number % len(pieces)] for number in range(count))


class Stream:
    """A stream of deltas that is read bit by bit."""

    def __init__(self, target: Target, **fields: Any) -> None:
        self.call = target.stub.GenerateDeltas(request(**fields))
        self.messages = aiter(self.call)

    async def error(self) -> grpc.aio.AioRpcError:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await drained(self.messages)
        return caught.value


async def begun(target: Target) -> Stream:
    """Returns a stream that has sent text."""
    stream = Stream(target, max_tokens=4000)
    assert (await anext(stream.messages)).text
    return stream


def nothing_runs(cloud: ModalCloud) -> bool:
    return all(call.state not in {"pending", "running"} for call in cloud.calls)


@pytest.mark.parametrize("cell", [*SOME_CELLS, *further(CELLS, but=SOME_CELLS)], ids=str)
async def test_no_refusal_ends_a_stream_or_changes_its_text(
    calm: ModalCloud, cell: tuple[Side, tuple[Status, float | None]]
) -> None:
    """The whole tables of `engines.modal.inbox` and `deployment.outbox`, except for a queue that is gone."""
    side, (status, retry_after) = cell
    async with serving(scripted.engine(APP)) as target:
        first = await begun(target)
        rpcs = GATEWAYS if side == "clients" else CONTAINERS
        times = 6 if status in REPEATED else 3
        faults = [calm.disturb(rpc, side=side, status=status, retry_after=retry_after, times=times) for rpc in rpcs]
        assert await asyncio.gather(*(text_of(target) for _ in range(3))) == [expected()] * 3
        assert faults[rpcs.index("QueueGet" if side == "clients" else "QueuePut")].befallen == times
        assert (await anext(first.messages)).text
        first.call.cancel()


@pytest.mark.parametrize("refusal", [*SOME_REFUSALS, *further(REFUSALS, but=SOME_REFUSALS)], ids=str)
async def test_a_queue_that_is_not_made_at_once_is_made_later(calm: ModalCloud, refusal: tuple[Status, float | None]) -> None:
    status, retry_after = refusal
    async with serving(scripted.engine(APP)) as target:
        fault = calm.disturb("QueueGetOrCreate", status=status, retry_after=retry_after, times=6 if status in REPEATED else 2)
        assert await asyncio.gather(*(text_of(target, max_tokens=4) for _ in range(3))) == [expected(4)] * 3
        assert fault.befallen == fault.times


async def test_a_queue_that_cannot_be_made_has_its_status(calm: ModalCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox, "QUEUE_CREATE_TIMEOUT", 0.5)
    async with serving(scripted.engine(APP)) as target:
        for status, code in (
            (Status.RESOURCE_EXHAUSTED, grpc.StatusCode.RESOURCE_EXHAUSTED),
            (Status.PERMISSION_DENIED, grpc.StatusCode.FAILED_PRECONDITION),
            (Status.UNAVAILABLE, grpc.StatusCode.UNAVAILABLE),
        ):
            fault = calm.disturb("QueueGetOrCreate", status=status)
            assert (await Stream(target).error()).code() is code
            assert fault.befallen > 1
            fault.end()
        assert await text_of(target) == expected()


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("status", "retry_after"), [(Status.RESOURCE_EXHAUSTED, None), (Status.RESOURCE_EXHAUSTED, 1.0), (Status.NOT_FOUND, None)]
)
async def test_eight_seconds_of_refusals_end_no_stream(calm: ModalCloud, status: Status, retry_after: float | None) -> None:
    async with serving(scripted.engine(APP)) as target:
        streams = [asyncio.create_task(text_of(target, max_tokens=200)) for _ in range(30)]
        await asyncio.sleep(1)
        calm.disturb(*GATEWAYS, *CONTAINERS, side="both", status=status, retry_after=retry_after)
        await asyncio.sleep(8)
        calm.calm()
        assert await asyncio.gather(*streams) == [expected(200)] * 30


@pytest.mark.thorough
async def test_a_slow_control_plane_ends_no_stream(calm: ModalCloud) -> None:
    async with serving(scripted.engine(APP)) as target:
        first = asyncio.create_task(text_of(target, max_tokens=600))
        await asyncio.sleep(0.5)
        calm.disturb(*GATEWAYS, *CONTAINERS, side="both", delay=3)
        assert await asyncio.gather(*(text_of(target) for _ in range(3))) == [expected()] * 3
        calm.calm()
        assert await first == expected(600)


@pytest.mark.thorough
@pytest.mark.parametrize("fault", [{"delay": outbox.PUT_ATTEMPT_TIMEOUT, "times": 1}, {"status": Status.RESOURCE_EXHAUSTED}])
async def test_twenty_seconds_without_a_put_end_no_stream(calm: ModalCloud, fault: dict[str, Any]) -> None:
    """The containers are silent while Modal does not answer one put, or refuses all puts."""
    async with serving(scripted.engine(APP)) as target:
        streams = [asyncio.create_task(text_of(target, max_tokens=1400)) for _ in range(3)]
        await asyncio.sleep(1)
        calm.disturb("QueuePut", side="containers", **fault)
        await asyncio.sleep(outbox.PUT_ATTEMPT_TIMEOUT)
        calm.calm()
        assert await asyncio.gather(*streams) == [expected(1400)] * 3


def test_a_put_without_an_answer_does_not_make_a_container_silent() -> None:
    assert outbox.PUT_ATTEMPT_TIMEOUT + outbox.HEARTBEAT_INTERVAL + outbox.MAX_RETRY_DELAY < received_events.MAX_SILENCE


async def test_a_queue_that_is_gone_ends_its_calls_and_is_made_anew(
    deployed: ModalCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue_reader, "CONFIRMATION_SECONDS", 3.0)
    async with serving(scripted.engine(APP)) as target:
        stream = await begun(target)
        deployed.expire_ephemeral()
        ending = asyncio.create_task(stream.error())

        async def works() -> bool:
            # The first call may still get the old queue, because the server does not know yet that it is gone.
            try:
                return await text_of(target, max_tokens=4) == expected(4)
            except grpc.aio.AioRpcError as error:
                return error.code() is not grpc.StatusCode.UNAVAILABLE

        await until(works, "new calls have a new queue")
        assert await text_of(target) == expected()
        error = await ending
        assert (error.code(), RetryInfo in details_of(error)) == (grpc.StatusCode.UNAVAILABLE, True)
        await until(lambda: nothing_runs(deployed), "the call has ended in the class", within=20)


@pytest.mark.thorough
async def test_refusals_that_end_no_call_do_not_make_a_container_silent(
    calm: ModalCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(received_events, "MAX_SILENCE", 4.0)
    async with serving(scripted.engine(APP)) as target:
        stream = asyncio.create_task(text_of(target, max_tokens=600))
        await asyncio.sleep(0.5)
        calm.limit("QueueGet")
        await asyncio.sleep(8)
        calm.calm()
        assert await stream == expected(600)


@asynccontextmanager
async def no_new_container(cloud: ModalCloud) -> AsyncIterator[None]:
    """Starts no containers in the context."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cloud._fleet, "scale", lambda _: None)
        patch.setattr(cloud._fleet, "keep_warm", lambda _: [])
        yield
    for function in cloud._apps.functions.values():
        cloud._loop.call_soon_threadsafe(cloud._fleet.scale, function)


@pytest.mark.thorough
@pytest.mark.parametrize(("how", "within"), [("interrupt", 5.0), ("kill", 37.0)])
async def test_the_loss_of_a_container_is_told_before_there_is_another(deployed: ModalCloud, how: str, within: float) -> None:
    async with serving(scripted.engine(APP)) as target:
        stream = await begun(target)
        made = deployed.calls[-1]
        assert made.container is not None
        async with no_new_container(deployed):
            getattr(made.container, how)()
            lost = time.monotonic()
            error = await stream.error()
            assert time.monotonic() - lost < within
            assert (error.code(), RetryInfo in details_of(error)) == (grpc.StatusCode.UNAVAILABLE, True)
        await until(lambda: nothing_runs(deployed), "nothing is left")
        assert await text_of(target, max_tokens=4) == expected(4)


@pytest.mark.thorough
async def test_a_call_that_has_sent_nothing_outlives_the_loss_of_its_container(cloud: ModalCloud) -> None:
    scripted.deploy(cloud, "reading", Script(prompt_delay=1.5))
    async with serving(scripted.engine("reading")) as target:
        call = asyncio.create_task(text_of(target, max_tokens=4))
        before = len(cloud.calls)
        await until(lambda: any(made.state == "running" for made in cloud.calls[before:]), "the call runs")
        await asyncio.sleep(0.6)  # so that the gateway has heard that the engine has begun
        container = cloud.calls[-1].container
        assert container is not None
        container.interrupt()
        assert await call == expected(4)


@pytest.mark.thorough
@pytest.mark.parametrize("with_its_container", [False, True])
async def test_calls_of_a_gateway_that_was_killed_end(cloud: ModalCloud, with_its_container: bool) -> None:
    """Calls that run, calls that wait in the container, and calls that run again in another container."""
    app = f"leased-{with_its_container}"
    scripted.deploy(cloud, app, Script(token_delay=0.05, slots=2))

    def gateway() -> Any:
        return flywheel_server("--engine=flywheel", f"--modal-app={app}")

    with gateway() as killed, gateway() as other:
        before = len(cloud.calls)
        async with connected(killed.address) as doomed:
            streams = [asyncio.create_task(drained(doomed.stub.GenerateDeltas(request(max_tokens=4000)))) for _ in range(6)]
            await until(lambda: len(cloud.calls) - before == 6, "all calls are on Modal")
            await until(lambda: all(call.state == "running" for call in cloud.calls[before:]), "all are in the container")
            killed.process.kill()
            if with_its_container:
                container = cloud.calls[before].container
                assert container is not None
                container.kill()
            await asyncio.gather(*streams, return_exceptions=True)
        begun = time.monotonic()
        async with connected(other.address) as target:
            assert await text_of(target, max_tokens=5) == expected(5)
        assert time.monotonic() - begun < 25
        await until(lambda: nothing_runs(cloud), "the calls of the killed gateway have ended")


async def test_a_call_that_modal_accepted_without_saying_so_is_cancelled(
    calm: ModalCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stray_calls, "STRAY_CANCEL_DELAY", 0.5)
    async with serving(scripted.engine(APP)) as target:
        stream = await begun(target)
        before = len(calm.calls)
        # Modal's client repeats the request three times, and the stand-in takes each request for another call.
        lost = calm.disturb("FunctionMap", status=Status.UNAVAILABLE, of_answers=True, times=4)
        error = await Stream(target, max_tokens=4000).error()
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        await until(lambda: lost.befallen == 4, "the client has given up")
        calm.disturb("FunctionCallCancel", status=Status.NOT_FOUND, times=2)
        await until(lambda: {call.state for call in calm.calls[before:]} == {"cancelled"}, "all its calls are cancelled")
        assert (await anext(stream.messages)).text
        stream.call.cancel()


async def test_events_that_wait_are_joined_and_split_into_items_that_modal_takes() -> None:
    queue: Any = None  # not used
    sender = Sender(Outbox(queue, "partition", "container"), "call")
    sender.emit(Started(3))
    for number in range(1, 1001):
        for index in range(4):
            sender.emit(TextDelta(index, "word " * 10, number))
    batches = sender.take()
    events = [event for each in batches for event in each.events]
    assert events == [Started(3), *(TextDelta(index, "word " * 10_000, 1000) for index in range(4))]
    assert [each.number for each in batches] == [0, 1]
    sender.emit(TextDelta(0, "x", 1001))
    assert sender.take() == [EventBatch("call", sender.attempt, 2, [TextDelta(0, "x", 1001)], "container")]
    assert sender.take() == []


def batch(number: int, container: str) -> EventBatch:
    return EventBatch("call", "attempt", number, [TextDelta(0, "x", 1)], container)


async def test_a_container_with_an_id_is_silent_by_the_clock_of_the_reader() -> None:
    for container, clock, ends in (("c", 31.0, True), ("c", 29.0, False), ("", 100.0, False), ("other", 100.0, False)):
        received = ReceivedEvents()
        received.add(batch(0, container))
        received.check(clock, {"c": 0.0})
        assert await received.take() == [TextDelta(0, "x", 1)]
        if ends:
            with pytest.raises(EngineUnavailableError):
                await received.take()


async def test_the_error_of_a_call_is_asked_for_as_soon_as_the_class_tells_of_it(
    deployed: ModalCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the call would not be polled for a long time."""
    monkeypatch.setattr("flywheel_server.engines.modal.engine.MAX_CONCURRENT_POLLS", 1)
    async with serving(scripted.engine(APP)) as target:
        stream = await begun(target)
        asked = time.monotonic()
        error = await Stream(target, max_tokens=9000).error()
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert time.monotonic() - asked < 10
        stream.call.cancel()


OF_THE_QUEUE = ("QueueGet", "QueuePut", "QueueLen", "QueueClear", "FunctionGetOutputs")


@pytest.mark.thorough
async def test_requests_to_modal_do_not_grow_with_the_streams(deployed: ModalCloud) -> None:
    seconds = 6.0
    async with serving(scripted.engine(APP)) as target:
        for streams in (1, 64):
            running = await asyncio.gather(*(begun(target) for _ in range(streams)))
            reading = [asyncio.create_task(drained(stream.messages)) for stream in running]
            before = sum(deployed.rpcs[name] for name in OF_THE_QUEUE)
            await asyncio.sleep(seconds)
            made = sum(deployed.rpcs[name] for name in OF_THE_QUEUE) - before
            assert made / seconds < 14, streams
            for stream in running:
                stream.call.cancel()
            await asyncio.gather(*reading, return_exceptions=True)
            await until(lambda: nothing_runs(deployed), "they have ended")


async def test_the_first_text_of_a_call_does_not_wait(deployed: ModalCloud) -> None:
    async with serving(scripted.engine(APP)) as target:
        taken = []
        for _ in range(5):
            begun_at = time.monotonic()
            stream = await begun(target)
            taken.append(time.monotonic() - begun_at)
            stream.call.cancel()
            await asyncio.sleep(0.5)
        assert min(taken) < 0.2
