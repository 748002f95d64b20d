"""The lines about calls: what they say, that no call has two, and that callers cannot forge them."""

import asyncio
import json
import random
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.engines.base import PreparedRequest, PromptToken
from flywheel_server.engines.scripted import Script, ScriptedEngine
from flywheel_server.telemetry.call_log import CallLog
from flywheel_server.telemetry.calls import CallRecord
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.server.http2_client import http2, prefixed
from tests.serving import Target, code_of, serving, until
from tests.telemetry.logged import Log, logging_to

PATH = "/flywheel.v1.GenerationService/GenerateAll"
KEY = "0123456789abcdef"
REQUEST = pb.GenerationRequest(text="some words here", max_tokens=5)


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    with logging_to(tmp_path / "log") as log:
        yield log


def named(request_id: str, *metadata: tuple[str, str]) -> Any:
    return (("x-request-id", request_id), *metadata)


async def end_of(log: Log, request_id: str) -> dict[str, Any]:
    """Returns the one line that says how the call ended."""
    await until(lambda: bool(log.ends(request_id)), "it is logged")
    (line,) = log.ends(request_id)
    return line


@pytest.mark.parametrize("method", ["Generate", "GenerateDeltas", "GenerateAll"])
async def test_a_line_says_what_a_call_was_and_where_its_time_went(method: str, log: Log) -> None:
    engine = ScriptedEngine(Script(prompt_delay=0.05, token_delay=0.01))
    async with serving(engine, log_calls=1, api_keys=KEY) as target:
        call = getattr(target.stub, method)(REQUEST, metadata=named("id-1", ("authorization", f"Bearer {KEY}")))
        assert await code_of(call) is grpc.StatusCode.OK
        line = await end_of(log, "id-1")
    assert (line["event"], line["level"], line["logger"]) == ("call finished", "info", "flywheel_server.telemetry.call_log")
    assert line["rpc.method"] == f"flywheel.v1.GenerationService/{method}"
    assert line["rpc.response.status_code"] == "OK"
    assert (line["network.peer.address"], type(line["network.peer.port"])) == ("127.0.0.1", int)
    assert (line["gen_ai.request.model"], line["caller"]) == ("script", "FLYWHEEL_API_KEYS-1")
    assert (line["gen_ai.usage.input_tokens"], line["gen_ai.usage.output_tokens"]) == (4, 5)
    assert 0 <= line["queue_seconds"] <= line["first_output_seconds"] - 0.06
    assert 0.1 <= line["seconds"] > line["first_output_seconds"]
    assert not {"reason", "slow_phase"} & set(line)


async def test_a_call_that_generates_nothing_has_no_figures_of_a_generation(log: Log) -> None:
    async with serving(ScriptedEngine(), log_calls=1) as target:
        await target.stub.GetModel(pb.GetModelRequest(), metadata=named("id-1"))
        line = await end_of(log, "id-1")
    assert (line["rpc.method"], line["rpc.response.status_code"]) == ("flywheel.v1.GenerationService/GetModel", "OK")
    assert not [name for name in line if name.startswith(("gen_ai", "queue", "first"))]


class SlowTokenizer(ScriptedEngine):
    async def tokenize(self, prepared: PreparedRequest) -> Sequence[PromptToken]:
        await asyncio.sleep(0.2)
        return await super().tokenize(prepared)


async def test_to_tokenize_is_work_and_no_wait_in_the_queue(log: Log) -> None:
    async with serving(SlowTokenizer(), log_calls=1) as target:
        await target.stub.Tokenize(pb.TokenizeRequest(text="some words here"), metadata=named("id-1"))
        line = await end_of(log, "id-1")
    assert line["queue_seconds"] < 0.1
    assert line["seconds"] >= 0.2


async def health_code(target: Target, request_id: str, service: str) -> grpc.StatusCode:
    request = health_pb2.HealthCheckRequest(service=service)
    return await code_of(health_pb2_grpc.HealthStub(target.channel).Check(request, metadata=named(request_id)))


async def test_a_status_of_health_itself_is_logged_if_calls_are(log: Log) -> None:
    async with serving(ScriptedEngine(), log_calls=1) as target:
        assert await health_code(target, "id-1", "nonsense") is grpc.StatusCode.NOT_FOUND
        line = await end_of(log, "id-1")
    assert (line["event"], line["rpc.response.status_code"]) == ("call finished", "NOT_FOUND")


async def test_only_a_refusal_by_the_server_is_logged_in_any_case(log: Log) -> None:
    async with serving(ScriptedEngine()) as target:
        assert await health_code(target, "id-1", "nonsense") is grpc.StatusCode.NOT_FOUND
        assert await health_code(target, "id-2", "x" * 5000) is grpc.StatusCode.RESOURCE_EXHAUSTED
        line = await end_of(log, "id-2")
    assert line["event"] == "call refused"
    assert not log.ends("id-1")


@pytest.mark.parametrize(
    ("script", "request_", "event", "code"),
    [
        (Script(), REQUEST, "call finished", "OK"),
        (Script(), pb.GenerationRequest(), "call refused", "INVALID_ARGUMENT"),
        (Script(failure="overloaded", fail_in_queue=True), REQUEST, "call refused", "RESOURCE_EXHAUSTED"),
        (Script(failure="failed", fail_after=2), REQUEST, "call failed", "INTERNAL"),
        (Script(), pb.GenerationRequest(text="x" * 100, max_tokens=1), "call refused", "INVALID_ARGUMENT"),
    ],
    ids=["served", "invalid", "overloaded", "failed", "too long"],
)
async def test_a_call_has_one_line(script: Script, request_: pb.GenerationRequest, event: str, code: str, log: Log) -> None:
    async with serving(ScriptedEngine(script), log_calls=1, max_text_bytes=50) as target:
        assert (await code_of(target.stub.GenerateDeltas(request_, metadata=named("id-1")))).name == code
        await end_of(log, "id-1")
    # The server has stopped, so that there can be no further line.
    line = await end_of(log, "id-1")
    assert line["event"] == event


@pytest.mark.parametrize("seconds", [None, 1.0])
async def test_a_call_that_the_queue_or_the_engine_keeps_has_one_line_when_its_caller_leaves(
    seconds: float | None, log: Log
) -> None:
    engine = ScriptedEngine(Script(prompt_delay=60))
    async with serving(engine, log_calls=1, max_concurrent=1) as target:
        calls = []
        for name in ("engine", "queue"):
            calls.append(target.stub.GenerateDeltas(REQUEST, timeout=seconds, metadata=named(name)))
            await until(lambda: _reached(target, len(calls)), "it has arrived")
        if seconds is None:
            for call in calls:
                call.cancel()
        await asyncio.gather(*map(code_of, calls), return_exceptions=True)
        for name in ("engine", "queue"):
            await end_of(log, name)
    for name in ("engine", "queue"):
        line = await end_of(log, name)
        if seconds is None:
            assert (line["event"], line["rpc.response.status_code"]) == ("call finished", "CANCELLED")
        else:
            assert (line["event"], line["code"]) == ("call refused", "DEADLINE_EXCEEDED")
            # The second call may get the place of the first one just before its own deadline.
            assert line["phase"] in {"prompt", "queue" if name == "queue" else "prompt"}
            assert line["seconds"] >= line["queue_seconds"] >= (0 if name == "engine" else seconds / 2)


async def _reached(target: Target, count: int) -> bool:
    stats = await target.stub.GetStats(pb.GetStatsRequest())
    return bool(stats.active + stats.queued >= count)


@pytest.mark.parametrize("large", ["message", "metadata"])
async def test_a_status_that_nobody_gets_is_not_in_the_line(large: str, log: Log) -> None:
    """A request or metadata that are too large: gRPC ends the call by itself before the server could answer."""
    request = pb.GenerationRequest(text="x" * (20_000 if large == "message" else 1), max_tokens=1)
    metadata = named("id-1", ("name", "x" * (17_000 if large == "metadata" else 1)))
    async with serving(ScriptedEngine(), log_calls=1, max_message_bytes=10_000, max_header_bytes=8192) as target:
        await target.stub.GetModel(pb.GetModelRequest())  # so that the client has acknowledged gRPC's limit of metadata
        assert await code_of(target.stub.GenerateAll(request, metadata=metadata)) is grpc.StatusCode.RESOURCE_EXHAUSTED
        line = await end_of(log, "id-1")
    assert (line["event"], line["rpc.response.status_code"]) == ("call finished", "CANCELLED")
    assert "reason" not in line


async def test_a_call_of_a_method_that_does_not_exist_has_its_id_and_no_address(log: Log) -> None:
    async with serving(ScriptedEngine(), log_calls=1) as target:
        for request_id in ("id-1", "i" * 129):
            unknown: Any = target.channel.unary_unary("/flywheel.v1.GenerationService/Nonsense")
            assert await code_of(unknown(b"", metadata=named(request_id))) is grpc.StatusCode.UNIMPLEMENTED
        line = await end_of(log, "id-1")
    assert (line["rpc.method"], line["rpc.response.status_code"]) == ("_OTHER", "UNIMPLEMENTED")
    assert not [name for name in line if name.startswith("network.")]
    (other,) = [each for each in log.lines() if each["event"] == "call finished" and each["request_id"] != "id-1"]
    assert len(other["request_id"]) == 32, "a new id, because the caller's is not valid"


@pytest.mark.parametrize("share", [0, 1])
async def test_a_slow_call_says_in_which_phase_it_was_slow(share: float, log: Log) -> None:
    engine = ScriptedEngine(Script(prompt_delay=0.2, token_delay=0.001))
    async with serving(engine, log_calls=share, slow_call=0.15, max_concurrent=1) as target:
        calls = [target.stub.GenerateAll(REQUEST, metadata=named(f"id-{number}")) for number in range(3)]
        await asyncio.gather(*calls)
        lines = [await end_of(log, f"id-{number}") for number in range(3)]
    assert {line["level"] for line in lines} == {"warning"}
    by_wait = sorted(lines, key=lambda line: line["queue_seconds"])
    assert [line["slow_phase"] for line in by_wait][::2] == ["prompt", "queue"]


async def test_calls_that_are_not_slow_and_streams_of_health_are_not_logged_unless_asked_for(log: Log) -> None:
    async with serving(ScriptedEngine(Script(token_delay=0.02)), slow_call=0.3) as target:
        watch = health_pb2_grpc.HealthStub(target.channel).Watch(health_pb2.HealthCheckRequest(), metadata=named("id-2"))
        await watch.read()
        await target.stub.GenerateAll(pb.GenerationRequest(text="x", max_tokens=20), metadata=named("id-1"))
        watch.cancel()
    assert "call finished" not in log.text()


async def test_nothing_is_recorded_if_no_calls_are_logged(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(CallRecord, "__init__", lambda *_: made.append(1))
    async with serving(ScriptedEngine(), log_calls=0, slow_call=0) as target:
        await target.stub.GenerateAll(REQUEST)
    assert not made


def test_a_share_of_the_calls_is_logged(tmp_path: Path) -> None:
    random.seed(1)
    some = CallLog(0.25, 0)
    with logging_to(tmp_path / "log") as log:
        for number in range(1000):
            call = CallRecord("a.b/C", str(number), "ipv6:%5B::1%5D:5000")
            call.code, call.ended_at = grpc.StatusCode.OK, call.began
            some.end(call)
    lines = log.lines()
    assert 200 < len(lines) < 300
    assert {(line["network.peer.address"], line["network.peer.port"]) for line in lines} == {("::1", 5000)}


HOSTILE = {
    "JSON": 'x"} {"event":"call finished"',
    "line separator": "x\u2028forged",
    "right to left": "x\u202eforged",
    "too long": "a" * 129,
    "escape": "x\x1b[2J",
    "field": "id-1 rpc.response.status_code=OK",
}


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
async def test_an_id_that_could_forge_a_line_is_replaced(form: Any, name: str, tmp_path: Path) -> None:
    """Sent as bytes, because a client of gRPC refuses to send some of them."""
    with logging_to(tmp_path / "log", form) as log:
        async with serving(ScriptedEngine(), log_calls=1) as target:
            async with http2(target.address) as client:
                await client.call(PATH, prefixed(REQUEST.SerializeToString()), ("x-request-id", name))
            await until(lambda: bool(log.text()), "it is logged")
    about_call, about_stop = log.text().splitlines()
    assert name not in about_call
    assert "stopping" in about_stop


@pytest.mark.parametrize("form", ["text", "json"])
def test_no_peer_and_no_valid_id_passes_for_something_else(form: Any, tmp_path: Path) -> None:
    """A path of a Unix socket may have any bytes, though this server listens on none."""
    peer, request_id = "unix:/tmp/x\n2026-11-26T00:00:00Z [info] forged", 'a"},"rpc.response.status_code":"OK",b=c'
    with logging_to(tmp_path / "log", form) as log:
        call = CallRecord("a.b/C", request_id, peer)
        call.code, call.ended_at = grpc.StatusCode.UNAVAILABLE, call.began
        call.trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
        CallLog(1, 0).end(call)
    (line,) = log.text().splitlines()
    if form == "json":
        said = json.loads(line)
        assert (said["network.peer.address"], said["request_id"]) == (peer, request_id)
        assert (said["rpc.response.status_code"], said["trace_id"]) == ("UNAVAILABLE", "4bf92f3577b34da6a3ce929d0e0e4736")
    else:
        fields = shlex.split(line)
        assert f"request_id={request_id}" in fields
        assert "rpc.response.status_code=UNAVAILABLE" in fields
        assert "trace_id=4bf92f3577b34da6a3ce929d0e0e4736" in fields
