"""What is measured of the time of calls, compared with what an engine did."""

import asyncio
import time

import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.engines.base import Event, PreparedRequest, Sink, Started, TextDelta
from flywheel_server.engines.scripted import Script, ScriptedEngine
from flywheel_server.messages import GenerationResponseSample

from tests.serving import code_of, free_ports, serving
from tests.telemetry.scraping import figures
from tests.telemetry.test_counting import OK, OK_CODE, SERVICE


class TimedEngine(ScriptedEngine):
    """An engine that notes when it gets each call, and when it emits the first and the last text of it.

    The times are compared, and not the pace of the script, which a busy machine does not keep.
    """

    def __init__(self, script: Script) -> None:
        super().__init__(script)
        self.times: list[tuple[float, float, float]] = []

    async def generate(self, prepared: PreparedRequest, sink: Sink) -> None:
        noting = _Noting(sink)
        called = time.perf_counter()
        await super().generate(prepared, noting)
        self.times.append((called, noting.times[0], noting.times[-1]))

    def means(self, sent: float) -> list[float]:
        """Returns mean seconds: from sending to the call, to its first text, and to its end; and between these texts."""
        columns = [(called - sent, first - sent, last - sent, last - first) for called, first, last in self.times]
        return [sum(column) / len(column) for column in zip(*columns, strict=True)]


class _Noting:
    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self.is_full = False
        self.times: list[float] = []

    def emit(self, event: Event) -> None:
        if not isinstance(event, Started):
            self.times.append(time.perf_counter())
        self._sink.emit(event)


async def disagreeing() -> dict[str, tuple[float, float]]:
    """Makes calls that wait for each other. Returns the measured and the expected mean of each time that is 5 % off or more."""
    (port,) = free_ports(1)
    engine = TimedEngine(Script(prompt_delay=0.4, token_delay=0.02))
    request = pb.GenerationRequest(text="x", max_tokens=26)
    async with serving(engine, metrics_address=f"127.0.0.1:{port}", max_concurrent=1) as target:
        await target.stub.GetModel(pb.GetModelRequest())
        sent = time.perf_counter()
        # One after the other: the second waits for the first, and the third for both.
        assert await asyncio.gather(*(code_of(target.stub.GenerateDeltas(request)) for _ in range(3))) == [OK_CODE] * 3
        read = await figures(port)
    wait, first, whole, decoding = engine.means(sent)
    assert wait > 0.9
    expected = {
        "flywheel_queue_wait_seconds": wait,
        "gen_ai_server_time_to_first_token_seconds": first,
        "gen_ai_server_time_per_output_token_seconds": decoding / 25,
        "gen_ai_server_request_duration_seconds": whole,
    }
    means = {name: (read.mean(name), seconds) for name, seconds in expected.items()}
    means["rpc_server_call_duration_seconds"] = (
        read.mean("rpc_server_call_duration_seconds", rpc_method=f"{SERVICE}/GenerateDeltas"),
        whole,
    )
    return {name: pair for name, pair in means.items() if pair[0] != pytest.approx(pair[1], rel=0.05)}


async def test_times_agree_with_those_of_the_engine_within_5_percent() -> None:
    """Tried up to three times, because a busy machine may pause between two looks at the clock."""
    wrong = [await disagreeing()]
    while wrong[-1] and len(wrong) < 3:
        wrong.append(await disagreeing())
    assert not wrong[-1], wrong


class OneAfterTheOther(ScriptedEngine):
    """An engine whose samples do not begin together."""

    async def generate(self, prepared: PreparedRequest, sink: Sink) -> None:
        sink.emit(Started(1))
        for index in range(prepared.request.num_samples):
            await asyncio.sleep(0.2)
            for tokens in range(1, 4):
                sink.emit(TextDelta(index, "x", tokens))
            sink.emit(
                GenerationResponseSample(text="xxx", generated_tokens=3, finished=1.0, finish_reason="length", index=index)
            )


async def test_the_time_per_token_has_no_waits_before_the_first_token_of_a_sample() -> None:
    (port,) = free_ports(1)
    async with serving(OneAfterTheOther(), metrics_address=f"127.0.0.1:{port}") as target:
        assert await code_of(target.stub.GenerateDeltas(pb.GenerationRequest(text="x", max_tokens=3, num_samples=3))) is OK_CODE
        read = await figures(port)
    assert read.total("gen_ai_server_time_per_output_token_seconds_count") == 3
    # The last sample begins 0.4 s after the first one, and has two tokens after its first one.
    assert read.mean("gen_ai_server_time_per_output_token_seconds") < 0.05
    assert read.mean("gen_ai_server_time_to_first_token_seconds") < 0.35


class WholeSamples(ScriptedEngine):
    """An engine that cannot stream."""

    async def generate(self, prepared: PreparedRequest, sink: Sink) -> None:
        await super().generate(prepared, _Whole(sink))


class _Whole:
    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self.is_full = False

    def emit(self, event: Event) -> None:
        if not isinstance(event, TextDelta):
            self._sink.emit(event)


async def test_an_engine_that_cannot_stream_has_no_time_per_token() -> None:
    (port,) = free_ports(1)
    async with serving(WholeSamples(), metrics_address=f"127.0.0.1:{port}") as target:
        assert await code_of(target.stub.GenerateDeltas(OK)) is OK_CODE
        read = await figures(port)
    assert read.total("gen_ai_server_time_to_first_token_seconds_count") == 1
    assert read.total("gen_ai_server_time_per_output_token_seconds_count") == 0
