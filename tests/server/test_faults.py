"""Faults: whatever breaks, each call ends with a status, the other calls go on, and nothing is left behind.

Certificates and keys that change are in test_tls and test_keys, dead engines in test_supervision, shortages of the machine
in test_shortage, readers of the log that stall in test_stalled_readers, readers of streams that stall in test_delivery, and
servers that are stopped, killed and started again in tests/client/test_restart.
"""

import asyncio
import random
import resource
import signal
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from typing import Any

import grpc
import grpc.aio
import psutil
import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_proto.v1 import generation_pb2_grpc
from flywheel_server import server
from flywheel_server.engines.base import Event, PreparedRequest, Sink, Started, TextDelta
from flywheel_server.engines.scripted import Script, ScriptedEngine
from flywheel_server.generations import Generations
from flywheel_server.server import serve
from flywheel_server.settings import Settings
from google.rpc.error_details_pb2 import ErrorInfo

from tests.pulled import PulledEngine
from tests.server.test_command import command, ready_line
from tests.server.test_delivery import CountingEngine, finished
from tests.server.test_errors import METHODS, FailingEngine, details_of
from tests.serving import Target, as_dict, code_of, connected, drained, serving, through_a_cable, until

REQUEST = pb.GenerationRequest(text="x", max_tokens=8, num_samples=2)
EVENTS = 1 + 2 * 8 + 2
"""`Started`, the deltas of two samples, and their ends."""


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("after", [0, 1, 2, 9, EVENTS - 1, EVENTS], ids=lambda after: f"after-{after}-events")
@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("a bug"), ExceptionGroup("several", [OSError()])], ids=repr)
async def test_an_engine_that_breaks_never_ends_with_ok(error: Exception, after: int, method: str) -> None:
    class Engine(FailingEngine):
        async def events(self, prepared: Any) -> Any:
            async for event in super().events(prepared):
                yield event
            # FailingEngine fails only before an event, so not after the last one.
            raise self.error

    async with serving(Engine(error, after)) as target:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await drained(getattr(target.stub, method)(REQUEST))
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert details_of(caught.value)[ErrorInfo].reason == "ENGINE_FAILED"
        stats = await target.stub.GetStats(pb.GetStatsRequest())
        assert (stats.active, stats.queued) == (0, 0)


@pytest.mark.parametrize("method", METHODS)
async def test_an_engine_that_cancels_itself_ends_with_a_status(method: str) -> None:
    class Engine(PulledEngine):
        async def events(self, prepared: Any) -> Any:
            async for event in super().events(prepared):
                yield event
                raise asyncio.CancelledError

    async with serving(Engine()) as target:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await drained(getattr(target.stub, method)(REQUEST, timeout=20))
        assert caught.value.code() is grpc.StatusCode.INTERNAL


def seen_generations(monkeypatch: pytest.MonkeyPatch) -> list[Generations]:
    """Returns a list which gets the `Generations` of the servers that are made from now on."""
    made: list[Generations] = []

    class Seen(Generations):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(server, "Generations", Seen)
    return made


class OddEngine(ScriptedEngine):
    """Generates as the test says."""

    def __init__(self, generate: Callable[[PreparedRequest, Sink], Awaitable[None]]) -> None:
        super().__init__()
        self._generate = generate

    async def generate(self, prepared: PreparedRequest, sink: Sink) -> None:
        await self._generate(prepared, sink)


async def refusal(target: Target, method: str) -> tuple[grpc.StatusCode, str]:
    """Makes a call that fails, checks that nothing is left of the call, and returns its status and reason."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await drained(getattr(target.stub, method)(REQUEST, timeout=20))
    stats = await target.stub.GetStats(pb.GetStatsRequest())
    assert (stats.active, stats.queued) == (0, 0)
    return caught.value.code(), details_of(caught.value)[ErrorInfo].reason


FAILED = (grpc.StatusCode.INTERNAL, "ENGINE_FAILED")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("error", [SystemExit(1), GeneratorExit(), BaseException("as a panic in Rust raises")], ids=repr)
async def test_an_engine_cannot_end_more_than_the_call(error: BaseException, method: str) -> None:
    async def generate(_: PreparedRequest, sink: Sink) -> None:
        sink.emit(Started())
        raise error

    async with serving(OddEngine(generate)) as target:
        assert await refusal(target, method) == FAILED


@pytest.mark.parametrize("method", ["Generate", "GenerateDeltas"])
async def test_an_engine_that_cancels_the_task_it_runs_in_ends_with_a_status(method: str) -> None:
    async def generate(_: PreparedRequest, sink: Sink) -> None:
        sink.emit(Started())
        task = asyncio.current_task()
        assert task
        task.cancel()
        await asyncio.sleep(0)

    async with serving(OddEngine(generate)) as target:
        assert await refusal(target, method) == FAILED


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("first", [TextDelta(0, "x", 1), finished(0, "x")], ids=["a delta", "a sample"])
async def test_text_before_the_start_is_a_failure_because_no_request_id_has_been_sent(first: Event, method: str) -> None:
    async def generate(_: PreparedRequest, sink: Sink) -> None:
        for event in (first, Started(), finished(0, "x"), finished(1, "x")):
            sink.emit(event)

    async with serving(OddEngine(generate)) as target:
        assert await refusal(target, method) == FAILED


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("begins", [False, True])
async def test_what_an_engine_emits_after_its_call_has_ended_is_ignored(begins: bool, method: str) -> None:
    sinks: list[Sink] = []

    async def generate(_: PreparedRequest, sink: Sink) -> None:
        if begins:
            sink.emit(Started())
        sinks.append(sink)
        await asyncio.Event().wait()

    async with serving(OddEngine(generate), slow_reader="end", max_stream_bytes=1024) as target:
        call: Any = getattr(target.stub, method)(REQUEST)
        await until(lambda: bool(sinks), "the engine has it")
        call.cancel()

        async def is_over() -> bool:
            stats = await target.stub.GetStats(pb.GetStatsRequest())
            return (stats.active, stats.queued) == (0, 0)

        await until(is_over, "the call has ended")
        late: list[Event] = [Started(), TextDelta(0, "x" * 2048, 1), TextDelta(0, "x" * 2048, 2), finished(0, "x")]
        for event in late:
            sinks[0].emit(event)
        assert await is_over()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("answer", [RuntimeError("cancelled"), None], ids=repr)
async def test_a_cancelled_call_ends_with_the_reason_for_the_cancel_whatever_its_engine_raises(
    answer: Exception | None, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def generate(_: PreparedRequest, sink: Sink) -> None:
        sink.emit(Started())
        asyncio.get_running_loop().call_soon(made[0].interrupt)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if answer:
                raise answer from None

    made = seen_generations(monkeypatch)
    async with serving(OddEngine(generate)) as target:
        assert await refusal(target, method) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_UNAVAILABLE")


@pytest.mark.parametrize("method", METHODS)
async def test_an_engine_that_hangs_holds_no_call_past_its_deadline(method: str) -> None:
    engine = ScriptedEngine(Script(hang_after=3))
    async with serving(engine) as target:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await drained(getattr(target.stub, method)(REQUEST, timeout=0.3))
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: engine.running == 0, "its place is free")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", ["reset", "half-open"])
async def test_a_client_that_vanishes_gives_its_place_up(how: str, method: str) -> None:
    engine = ScriptedEngine(Script(hang_after=3))
    async with (
        serving(engine, max_concurrent=2, keepalive_time=1, keepalive_timeout=0.2) as target,
        through_a_cable(target.address) as cable,
        connected(cable.address) as other,
    ):
        call = asyncio.ensure_future(drained(getattr(other.stub, method)(REQUEST)))
        await until(lambda: engine.running == 1, "it runs")
        if how == "reset":
            cable.cut()
        else:
            cable.unplug()
        await until(lambda: engine.running == 0, "its place is free", within=10)
        assert how == "reset" or not call.done(), "nobody has told the client"
        cable.cut()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        await target.stub.GenerateAll(pb.GenerationRequest(text="x", max_tokens=1))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("later", range(4))
async def test_a_call_that_is_ended_while_it_begins_gets_its_status(
    later: int, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Engine(PulledEngine):
        async def events(self, prepared: Any) -> Any:
            asyncio.get_running_loop().call_soon(end, later)
            async for event in super().events(prepared):
                yield event

    def end(later: int) -> None:
        if later:
            asyncio.get_running_loop().call_soon(end, later - 1)
        else:
            made[0].interrupt()

    made = seen_generations(monkeypatch)
    async with serving(Engine(Script(hang_after=1))) as target:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await drained(getattr(target.stub, method)(REQUEST, timeout=20))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert details_of(caught.value)[ErrorInfo].reason == "ENGINE_UNAVAILABLE"
        assert as_dict(caught.value.trailing_metadata())["x-request-id"]


@pytest.mark.thorough
async def test_an_engine_without_memory_ends_calls_with_a_status_and_does_not_hang() -> None:
    settings = ("--embedded-threads", "1", "--engine-timeout", "5", "--log-level", "error")
    async with command("--address", "127.0.0.1:0", *settings) as process:
        _, address = await ready_line(process)
        async with connected(address) as target:
            await target.stub.GenerateAll(pb.GenerationRequest(text="Hello", max_tokens=2))
            size = psutil.Process(process.pid).memory_info().vms
            # There is no memory for the stack of another thread, nor for large buffers.
            resource.prlimit(process.pid, resource.RLIMIT_AS, (size + 2**20, resource.RLIM_INFINITY))
            chance = random.Random(1)
            request = pb.GenerationRequest(text="word " * 1500, max_tokens=8)
            calls = [getattr(target.stub, chance.choice(METHODS))(request, timeout=60) for _ in range(8)]
            endings = await asyncio.gather(*(code_of(call) for call in calls))
        assert set(endings) <= {grpc.StatusCode.OK, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE}
        with suppress(ProcessLookupError):
            resource.prlimit(process.pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

        async def serves_or_is_gone() -> bool:
            if process.returncode is not None:
                return process.returncode != 0
            async with connected(address) as target:
                call = target.stub.GenerateAll(pb.GenerationRequest(text="Hello", max_tokens=2), timeout=5)
                return await code_of(call) is grpc.StatusCode.OK

        # How the server ends depends on where memory runs out first.
        await until(serves_or_is_gone, "the server goes on, has restarted its engine, or has exited with an error")


async def test_a_signal_while_prompts_are_tokenized_ends_the_server_as_always() -> None:
    settings = ("--embedded-threads", "1", "--withdraw-window", "0", "--drain-timeout", "0", "--log-level", "error")
    async with command("--address", "127.0.0.1:0", *settings) as process:
        _, address = await ready_line(process)
        async with connected(address) as target:
            # One word, whose tokenization takes a second or more, and cannot be interrupted.
            call = target.stub.GenerateAll(pb.GenerationRequest(text="-" * 600_000, max_tokens=1))

            async def arrived() -> bool:
                return bool((await target.stub.GetStats(pb.GetStatsRequest())).queued == 1)

            await until(arrived, "the prompt is being tokenized")
            process.send_signal(signal.SIGTERM)
            assert await code_of(call) is grpc.StatusCode.UNAVAILABLE
            assert await process.wait() == 0


async def test_a_peer_that_takes_nothing_does_not_keep_the_server_from_stopping() -> None:
    engine = CountingEngine(Script(text="x" * 65536, bytes_per_token=65536))
    settings = Settings(address="127.0.0.1:0", withdraw_window=0, drain_timeout=0.2)
    async with AsyncExitStack() as client:
        async with asyncio.timeout(None) as stopping, serve(engine, settings) as port:
            cable = await client.enter_async_context(through_a_cable(f"127.0.0.1:{port}"))
            # The client lets the server send as much as it likes, so that the socket is what fills up.
            options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 2**30)]
            channel = await client.enter_async_context(grpc.aio.insecure_channel(cable.address, options=options))
            stub: Any = generation_pb2_grpc.GenerationServiceStub(channel)
            calls = [stub.GenerateDeltas(pb.GenerationRequest(text="x", max_tokens=4000)) for _ in range(3)]
            for call in calls:
                await call.read()
            cable.unplug()
            taken = -1
            while taken != engine.taken:
                taken = engine.taken
                await asyncio.sleep(0.3)
            assert engine.running == 3, "the calls still run, although nothing more is sent"
            # A ping without an answer ends the connection after 20 s.
            stopping.reschedule(asyncio.get_running_loop().time() + 12)
        for call in calls:
            call.cancel()
