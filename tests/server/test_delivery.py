"""How events become messages for readers who keep up, fall behind, and stop reading."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_proto.v1 import generation_pb2_grpc
from flywheel_server.delivery import Buffer, Delivery, DeltaBuffer, ReaderPolicy, SampleBuffer
from flywheel_server.engines.base import Event, Sink, Started, TextDelta
from flywheel_server.engines.scripted import Script, ScriptedEngine
from flywheel_server.errors import SlowReaderError
from flywheel_server.messages import GenerationResponseSample
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo

from tests.pulled import PulledEngine
from tests.server.test_errors import details_of
from tests.serving import serving, until

PATIENT = ReaderPolicy(max_bytes=10, when_full="wait", timeout=60)


def finished(index: int, text: str) -> GenerationResponseSample:
    return GenerationResponseSample(text=text, generated_tokens=9, finished=1.0, finish_reason="stop", index=index)


class Source:
    """A generation that emits events one after the other, as long as there is room for them."""

    def __init__(self, *events: Event, error: Exception | None = None, delay: float = 0.0) -> None:
        self.taken = 0
        self._events = events
        self._error = error
        self._delay = delay
        self._scope = asyncio.timeout(None)
        self._ended_by: Exception | None = None

    async def run(self, sink: Sink) -> None:
        await asyncio.sleep(self._delay)
        for event in (Started(), *self._events):
            while sink.is_full:  # noqa: ASYNC110 - as an engine does that generates step by step
                await asyncio.sleep(0)
            sink.emit(event)
            self.taken += not isinstance(event, Started)
        if self._error:
            raise self._error

    def end(self, error: Exception) -> None:
        self._ended_by = self._ended_by or error
        if not self._scope.expired():
            self._scope.reschedule(0)

    async def deliver(self, buffer: Buffer, reader: "Reader", policy: ReaderPolicy) -> None:
        try:
            async with self._scope:
                await Delivery(policy).deliver(self, buffer, reader.begin, reader.write)
        except TimeoutError:
            assert self._ended_by
            raise self._ended_by from None


class Reader:
    """Takes a message each time the test permits it."""

    def __init__(self) -> None:
        self.begun = 0
        self.read: list[Any] = []
        self._may = asyncio.Semaphore(0)

    def may_read(self, messages: int = 1) -> None:
        for _ in range(messages):
            self._may.release()

    async def begin(self) -> None:
        assert not self.read
        self.begun += 1

    async def begin_again(self) -> None:
        """Takes the headers of one of several streams."""

    async def write(self, message: Any) -> None:
        await self._may.acquire()
        self.read.append(message)


def delivered(source: Source, buffer: Buffer, reader: Reader, policy: ReaderPolicy) -> asyncio.Task[None]:
    return asyncio.create_task(source.deliver(buffer, reader, policy))


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_waiting_events_leave_as_one_message_for_each_sample() -> None:
    source = Source(
        TextDelta(0, "a", 1),
        TextDelta(0, "b", 2),
        TextDelta(1, "x", 1),
        TextDelta(0, "é", 3),
        finished(1, "xyz"),
        finished(0, "abé"),
    )
    reader = Reader()
    delivering = delivered(source, DeltaBuffer(), reader, PATIENT)
    await settled()
    reader.may_read(10)
    await delivering
    texts = [(message.index, message.text, message.generated_tokens, message.finish_reason) for message in reader.read]
    assert texts == [(0, "abé", 9, "stop"), (1, "xyz", 9, "stop")]
    assert reader.begun == 1


async def test_the_source_waits_for_a_reader_that_is_behind() -> None:
    source = Source(*(TextDelta(0, "äb", number) for number in range(1, 101)), finished(0, "äb" * 100))
    reader = Reader()
    delivering = delivered(source, DeltaBuffer(), reader, PATIENT)
    await settled()
    # Four deltas of three bytes are being written, and as many wait.
    assert source.taken == 8
    reader.may_read()
    await settled()
    assert source.taken == 12
    reader.may_read(200)
    await delivering
    assert "".join(message.text for message in reader.read) == "äb" * 100


async def test_one_event_may_be_larger_than_the_buffer() -> None:
    source = Source(finished(0, "x" * 1000), finished(1, "y" * 1000))
    reader = Reader()
    delivering = delivered(source, SampleBuffer(), reader, PATIENT)
    reader.may_read(2)
    await delivering
    assert [message.index for message in reader.read] == [0, 1]


async def test_the_stream_ends_at_once_if_the_policy_says_so() -> None:
    reader = Reader()
    source = Source(*(TextDelta(0, "abc", number) for number in range(1, 101)))
    with pytest.raises(SlowReaderError):
        await delivered(source, DeltaBuffer(), reader, ReaderPolicy(max_bytes=10, when_full="end", timeout=60))
    assert reader.read == []


async def test_the_stream_ends_at_once_if_each_event_is_larger_than_the_buffer() -> None:
    source = Source(*(finished(index, "x" * 1000) for index in range(16)))
    with pytest.raises(SlowReaderError):
        async with asyncio.timeout(20):
            await delivered(source, SampleBuffer(), Reader(), ReaderPolicy(max_bytes=10, when_full="end", timeout=60))


async def test_a_reader_that_takes_nothing_ends_the_stream() -> None:
    reader = Reader()
    with pytest.raises(SlowReaderError):
        await delivered(Source(TextDelta(0, "abc", 1)), DeltaBuffer(), reader, ReaderPolicy(10, "wait", timeout=0.05))


async def test_a_source_that_is_slow_is_not_the_readers_fault() -> None:
    reader = Reader()
    reader.may_read(5)
    await Source(finished(0, "x"), delay=0.2).deliver(DeltaBuffer(), reader, ReaderPolicy(10, "wait", timeout=0.05))
    assert len(reader.read) == 1


async def test_an_error_is_raised_after_all_earlier_events_are_written() -> None:
    reader = Reader()
    reader.may_read(5)
    with pytest.raises(KeyError):
        await delivered(Source(TextDelta(0, "abc", 1), error=KeyError()), DeltaBuffer(), reader, PATIENT)
    assert [message.text for message in reader.read] == ["abc"]


async def test_a_cancel_stops_both_sides() -> None:
    reader = Reader()
    source = Source(*(TextDelta(0, "abc", number) for number in range(1, 101)))
    delivering = delivered(source, DeltaBuffer(), reader, PATIENT)
    await settled()
    delivering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await delivering
    taken = source.taken
    reader.may_read(100)
    await settled()
    assert (reader.read, source.taken) == ([], taken)


class CountingEngine(PulledEngine):
    """Counts the events that were taken from it."""

    taken = 0

    async def events(self, prepared: Any) -> Any:
        async for event in super().events(prepared):
            self.taken += 1
            yield event


@asynccontextmanager
async def one_that_stops_reading(method: str, **settings: Any) -> AsyncIterator[tuple[CountingEngine, Any]]:
    """Gives an engine that generates much text, and a call whose answer is not read. The buffers between the two are small."""
    # `Generate` sends only whole samples, so there are many, of half a MB or more each, that end one after the other.
    ends: dict[str, Any] = {"end_after": 25, "stagger": 5} if method == "Generate" else {}
    engine = CountingEngine(Script(text="x" * 20000, bytes_per_token=20000, token_delay=0.001, **ends))
    options = [("grpc.http2.bdp_probe", 0), ("grpc.max_receive_message_length", -1)]
    async with (
        serving(engine, max_stream_bytes=300_000, **settings) as target,
        grpc.aio.insecure_channel(target.address, options=options) as channel,
    ):
        stub: Any = generation_pb2_grpc.GenerationServiceStub(channel)
        asked = (500, 5) if method == "GenerateDeltas" else (200, 16)
        call = getattr(stub, method)(pb.GenerationRequest(text="x", max_tokens=asked[0], num_samples=asked[1]))
        await until(lambda: engine.running == 1, "it has begun")
        yield engine, call


async def test_an_unread_answer_gives_up_its_slot_and_still_arrives() -> None:
    engine = ScriptedEngine(Script(text="x" * 20000, bytes_per_token=20000))
    options = [("grpc.http2.bdp_probe", 0), ("grpc.max_receive_message_length", -1)]
    async with (
        serving(engine, max_concurrent=1, max_queued=0, slow_reader_timeout=2) as target,
        grpc.aio.insecure_channel(target.address, options=options) as channel,
    ):
        # Called as a stream, because a client may leave a stream unread. gRPC reads a single answer at once.
        path = "/flywheel.v1.GenerationService/GenerateAll"
        generate = channel.unary_stream(path, pb.GenerationRequest.SerializeToString, pb.GenerationResponse.FromString)
        call: Any = generate(pb.GenerationRequest(text="x", max_tokens=1000))
        await until(lambda: engine.running == 1, "it runs")
        await until(lambda: engine.running == 0, "it has been generated")

        async def taken() -> bool:
            return await target.stub.GenerateAll(pb.GenerationRequest(text="x", max_tokens=1)).code() is not grpc.StatusCode.OK

        assert await taken(), "the call keeps its slot while its answer may still be read"

        async def free() -> bool:
            return not await taken()

        await until(free, "its place is free")
        assert len((await call.read()).responses[0].text) == 20_000_000
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert details_of(caught.value)[ErrorInfo].reason == "SLOW_READER"


async def rest(call: Any) -> tuple[int, grpc.aio.AioRpcError | None]:
    """Reads to the end of the call, and returns how many samples finished, and the error of the call."""
    finished = 0
    try:
        while message := await call.read():
            finished += bool(message.finish_reason)
    except grpc.aio.AioRpcError as error:
        return finished, error
    return finished, None


async def test_the_engine_waits_for_a_reader_that_stops_and_goes_on_with_it() -> None:
    async with one_that_stops_reading("GenerateDeltas") as (engine, call):
        before = -1
        while engine.taken != before:
            before = engine.taken
            await asyncio.sleep(0.1)
        assert engine.running == 1
        assert 0 < engine.taken < 1000, "of 2500 deltas"
        assert await rest(call) == (5, None)


@pytest.mark.parametrize("method", ["Generate", "GenerateDeltas"])
@pytest.mark.parametrize("settings", [{"slow_reader": "end"}, {"slow_reader_timeout": 0.3}], ids=["end", "wait"])
async def test_a_reader_that_stops_loses_the_stream_and_learns_why(settings: dict[str, Any], method: str) -> None:
    async with one_that_stops_reading(method, **settings) as (engine, call):
        await until(lambda: engine.running == 0, "the server ends the generation although the caller reads nothing")
        finished, error = await rest(call)
        assert finished < 16
        assert error is not None
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert details_of(error)[ErrorInfo].reason == "SLOW_READER"
        assert RetryInfo not in details_of(error)
