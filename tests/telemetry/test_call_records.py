"""Records of calls: when they are reported, and what is kept of them when the calls have ended."""

import gc
from pathlib import Path

import grpc
import grpc.aio
import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.engines.scripted import ScriptedEngine
from flywheel_server.grpc_types import Metadata
from flywheel_server.messages import GenerationRequest
from flywheel_server.telemetry import calls
from flywheel_server.telemetry.calls import CallRecord, Calls, current_call

from tests.serving import code_of, free_ports, serving, until
from tests.telemetry.logged import logging_to
from tests.telemetry.scraping import figures


class Ended:
    """Observes which calls have ended, and in whose context it is told so."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.contexts: set[CallRecord | None] = set()

    def begin(self, call: CallRecord, metadata: Metadata) -> None:
        pass

    def end(self, call: CallRecord) -> None:
        self.ids.append(call.request_id)
        self.contexts.add(current_call.get())


class Observed:
    """Calls that end as a test wants, and their observer."""

    def __init__(self) -> None:
        self.ended = Ended()
        self._calls = Calls([self.ended])

    def end(self, request_id: str, code: grpc.StatusCode | None = grpc.StatusCode.OK) -> None:
        call = CallRecord("a method", request_id, "a peer")
        current_call.set(call)
        call.code = code
        self._calls.end(call)


async def test_calls_that_ended_well_are_reported_together() -> None:
    observed = Observed()
    observed.end("one")
    observed.end("two")
    assert observed.ended.ids == []
    await until(lambda: bool(observed.ended.ids), "they are reported", within=5)
    assert observed.ended.ids == ["one", "two"]
    assert observed.ended.contexts == {None}
    observed.end("three")
    await until(lambda: len(observed.ended.ids) == 3, "the next one is reported", within=5)


async def test_no_more_calls_are_reported_together_than_the_event_loop_has_time_for() -> None:
    observed = Observed()
    ids = [str(number) for number in range(calls.MAX_UNREPORTED)]
    for request_id in ids[:-1]:
        observed.end(request_id)
    assert observed.ended.ids == []
    observed.end(ids[-1])
    assert observed.ended.ids == ids


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.INTERNAL, None])
async def test_a_call_that_ended_badly_is_reported_at_once_and_after_those_before(code: grpc.StatusCode | None) -> None:
    observed = Observed()
    observed.end("good")
    observed.end("bad", code)
    assert observed.ended.ids == ["good", "bad"]
    assert observed.ended.contexts == {None}


async def test_a_reader_of_the_metrics_and_the_log_of_a_server_that_stops_have_every_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "REPORT_INTERVAL", 3600.0)
    (port,) = free_ports(1)
    with logging_to(tmp_path / "log") as log:
        async with serving(ScriptedEngine(), log_calls=1, metrics_address=f"127.0.0.1:{port}") as target:
            for number in range(3):
                call = target.stub.GenerateAll(
                    pb.GenerationRequest(max_tokens=1, text="x"), metadata=[("x-request-id", str(number))]
                )
                assert await code_of(call) is grpc.StatusCode.OK
            # gRPC sends the status before the server notes the end of the call.
            await until(lambda: counted(port, 3), "the calls are counted", within=10)
            await target.stub.GetModel(pb.GetModelRequest())
        await until(lambda: len([line for line in log.lines() if line["event"] == "call finished"]) == 4, "all are logged", 10)


async def counted(port: int, calls: int) -> bool:
    return (await figures(port)).total("rpc_server_call_duration_seconds_count") == calls


async def test_an_ended_call_keeps_nobodys_prompt_in_memory() -> None:
    """Timers of a call keep its context, and so its record, until they are due."""

    def requests() -> int:
        gc.collect()
        return sum(type(thing) is GenerationRequest and thing.text == "to be forgotten" for thing in gc.get_objects())

    async with serving(ScriptedEngine(), slow_call=10) as target:
        for _ in range(5):
            await target.stub.GenerateAll(pb.GenerationRequest(text="to be forgotten", max_tokens=1), timeout=60)
        await until(lambda: requests() < 5, "they are reported")
