"""What is counted and measured, compared with what callers did to a scripted engine."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.engines.base import EngineSetupError, PreparedRequest, Sink, Started
from flywheel_server.engines.scripted import Script, ScriptedEngine
from flywheel_server.telemetry.metrics import Metrics
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.access.test_quotas import keys_for
from tests.server.http2_client import http2, prefixed
from tests.server.test_errors import METHODS
from tests.serving import Target, code_of, connected, free_ports, serving, until
from tests.telemetry.scraping import Figures, figures

SERVICE = "flywheel.v1.GenerationService"
GENERATING = [f"{SERVICE}/{method}" for method in METHODS]
OK = pb.GenerationRequest(text="12345678", max_tokens=4)
OK_CODE = grpc.StatusCode.OK
ENDLESS = pb.GenerationRequest(text="x", max_tokens=8000)


class Engine(ScriptedEngine):
    """An engine that reads one prompt for ever."""

    def __init__(self) -> None:
        super().__init__(Script(token_delay=0.002, fail_on="fail", fail_after=1))
        self.reading = 0

    async def generate(self, prepared: PreparedRequest, sink: Sink) -> None:
        if prepared.request.text != "hang":
            return await super().generate(prepared, sink)
        sink.emit(Started(1))
        self.reading += 1
        try:
            await asyncio.Event().wait()
        finally:
            self.reading -= 1


class Traffic:
    """Calls of each kind, and how many of them there were."""

    def __init__(self, target: Target, engine: Engine, metadata: dict[str, Any], begun: list[str]) -> None:
        self.codes: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.cancelled: Counter[str] = Counter()
        self.retries: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.callers: Counter[str] = Counter()
        self.slow = 0
        self.started = 0
        self._target = target
        self._engine = engine
        self._metadata = metadata
        self._begun = begun

    def call(self, request: pb.GenerationRequest, method: str = "GenerateDeltas", caller: str = "alice", **options: Any) -> Any:
        self.callers[caller] += 1
        return getattr(self._target.stub, method)(request, metadata=self._metadata[caller], **options)

    async def ok(self, rounds: int) -> None:
        for method in METHODS * rounds:
            codes = await asyncio.gather(*(code_of(self.call(OK, method, "bob")) for _ in range(4)))
            self.codes.update(code.name for code in codes)
            self.errors[""] += 4
            self.started += 4

    async def _refuse(self, call: Any, reason: str, code: grpc.StatusCode, *, is_valid: bool = False) -> None:
        assert await code_of(call) is code
        self.codes[code.name] += 1
        self.refused[reason] += 1
        if is_valid:
            self.errors[reason] += 1

    async def refused_ones(self) -> None:
        invalid = grpc.StatusCode.INVALID_ARGUMENT
        await self._refuse(self.call(pb.GenerationRequest(text="x")), "INVALID_ARGUMENT", invalid)
        too_long = pb.GenerationRequest(text="x" * 32_768, max_tokens=100)
        await self._refuse(self.call(too_long), "INVALID_ARGUMENT", invalid, is_valid=True)
        unsupported = pb.GenerationRequest(text="x", max_tokens=1, regex="a")
        await self._refuse(self.call(unsupported), "UNSUPPORTED_FIELD", invalid)
        unknown = pb.GenerationRequest.FromString(OK.SerializeToString() + b"\xf8\x07\x01")
        await self._refuse(self.call(unknown), "UNKNOWN_FIELD", invalid)
        two = pb.GenerationRequest(text="x", max_tokens=1, num_samples=2)
        await self._refuse(self.call(two, caller="small"), "QUOTA_EXCEEDED", grpc.StatusCode.RESOURCE_EXHAUSTED, is_valid=True)
        raw: Any = self._target.channel.unary_stream(f"/{SERVICE}/GenerateDeltas")
        await self._refuse(raw(b"\xff", metadata=self._metadata["alice"]), "MALFORMED_REQUEST", invalid)
        self.callers["alice"] += 1
        wrong = (("authorization", "Bearer wrong"),)
        for metadata, reason in (((), "API_KEY_MISSING"), (wrong, "API_KEY_INVALID")):
            await self._refuse(self._target.stub.Generate(OK, metadata=metadata), reason, grpc.StatusCode.UNAUTHENTICATED)

    async def failed(self) -> None:
        assert await code_of(self.call(pb.GenerationRequest(text="fail", max_tokens=9))) is grpc.StatusCode.INTERNAL
        self.codes["INTERNAL"] += 1
        self.errors["ENGINE_FAILED"] += 1
        self.started += 1

    def _cancel(self, call: Any, phase: str) -> None:
        call.cancel()
        self.codes["CANCELLED"] += 1
        self.cancelled[phase] += 1
        if phase != "request":
            self.errors["CANCELLED"] += 1
        if phase in {"prompt", "decode"}:
            self.started += 1

    async def cancelled_without_request(self) -> None:
        before = len(self._begun)
        call: Any = self._target.channel.stream_stream(f"/{SERVICE}/Generate")(metadata=self._metadata["alice"])
        await until(lambda: len(self._begun) > before, "the call has arrived")
        self.callers["alice"] += 1
        self._cancel(call, "request")

    async def cancelled_in_prompt(self) -> None:
        call = self.call(pb.GenerationRequest(text="hang", max_tokens=1))
        await until(lambda: self._engine.reading == 1, "the prompt is being read")
        self._cancel(call, "prompt")
        await until(lambda: self._engine.reading == 0, "it is read no more")

    async def full(self) -> None:
        """Fills the server, cancels a waiting call, has another one wait too long, and refuses one; then ends what runs."""
        running = [self.call(ENDLESS) for _ in range(4)]
        for call in running:
            await call.read()
        before = len(self._begun)
        waiting = [self.call(OK, "GenerateAll") for _ in range(2)]
        await until(lambda: len(self._begun) == before + 2, "both have arrived")
        await self._late()
        others = [self.call(OK, "GenerateAll") for _ in range(2)]
        await until(lambda: len(self._begun) == before + 5, "the queue is full")
        await self._refuse(self.call(OK), "OVERLOADED", grpc.StatusCode.RESOURCE_EXHAUSTED, is_valid=True)
        self.retries["OVERLOADED"] += 1
        for call in (*waiting, *others):
            self._cancel(call, "queue")
        for call in running:
            self._cancel(call, "decode")
        await until(lambda: self._engine.running == 0, "nothing runs")

    async def _late(self) -> None:
        """Makes a call that waits until its deadline, of which only the server knows: a client could end the call first."""
        self.callers["alice"] += 1
        async with http2(self._target.address) as client:
            headers = (*self._metadata["alice"], ("grpc-timeout", "300m"))
            late = client.begin(f"/{SERVICE}/GenerateDeltas", *headers)
            await client.send(late, prefixed(OK.SerializeToString()), end=True)
            assert await late.status() == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
        # On a busy machine, gRPC may end the call before our server does, which then sees only that the call has ended.
        is_ours = "x-request-id" in late.headers
        self.codes["DEADLINE_EXCEEDED" if is_ours else "CANCELLED"] += 1
        self.errors["IN_QUEUE" if is_ours else "CANCELLED"] += 1
        self.cancelled["queue"] += 1

    async def slow_reader(self) -> None:
        options = (("grpc.http2.bdp_probe", 0), ("grpc.use_local_subchannel_pool", 1))
        async with connected(self._target.address, *options) as reader:
            request = pb.GenerationRequest(text="x", max_tokens=8000, num_samples=4, logprobs=20)
            call = reader.stub.GenerateDeltas(request, metadata=self._metadata["alice"])
            await call.initial_metadata()
            await until(lambda: self._engine.running == 0, "the call has ended although nobody reads")
            # For the server, a caller who leaves before the status has been sent has cancelled the call.
            assert await code_of(call) is grpc.StatusCode.RESOURCE_EXHAUSTED
        self.callers["alice"] += 1
        self.codes["RESOURCE_EXHAUSTED"] += 1
        self.errors["SLOW_READER"] += 1
        self.slow += 1
        self.started += 1


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The methods of the calls that have arrived."""
    arrived: list[str] = []
    monkeypatch.setattr(Metrics, "begin", lambda _, call, __: arrived.append(call.method))
    return arrived


@asynccontextmanager
async def traffic(path: Path, begun: list[str]) -> AsyncIterator[tuple[Traffic, int]]:
    """Gives the calls to a server, and the port of its metrics."""
    engine = Engine()
    (port,) = free_ports(1)
    limits = {"max_concurrent": 4, "max_queued": 4, "slow_reader": "end", "max_stream_bytes": 1024}
    with keys_for(path, alice={}, bob={}, small={"max_concurrent": 1}) as metadata:
        async with serving(engine, metrics_address=f"127.0.0.1:{port}", api_keys_file=str(path), **limits) as target:
            yield Traffic(target, engine, metadata, begun), port


def check(read: Figures, sent: Traffic) -> None:
    calls = "rpc_server_call_duration_seconds_count"
    counted: Counter[str] = Counter()
    for method in GENERATING:
        counted.update(
            {code: int(value) for code, value in read.by(calls, "rpc_response_status_code", rpc_method=method).items()}
        )
    assert counted == sent.codes
    assert read.by("flywheel_calls_refused_total", "reason") == sent.refused
    assert read.by("flywheel_calls_failed_total", "reason") == {"ENGINE_FAILED": sent.errors["ENGINE_FAILED"]}
    assert read.by("flywheel_calls_cancelled_total", "phase") == sent.cancelled
    assert read.by("flywheel_retries_asked_total", "reason") == sent.retries
    assert read.by("gen_ai_server_request_duration_seconds_count", "error_type") == sent.errors
    assert read.by("flywheel_caller_calls_total", "caller") == sent.callers
    assert read.total("flywheel_slow_readers_total") == sent.slow
    assert read.by("gen_ai_client_token_usage_count", "gen_ai_token_type") == dict.fromkeys(("input", "output"), sent.started)
    assert read.total("flywheel_queue_wait_seconds_count") == sent.started
    assert read.total("flywheel_caller_tokens_total", caller="bob", type="output") == 4 * sent.errors[""]
    assert read.total("flywheel_caller_tokens_total", caller="bob", type="input") == 2 * sent.errors[""]
    for of_callers, of_all in (("output", "generated"), ("input", "prompt")):
        total = read.total(f"flywheel_{of_all}_tokens_total")
        assert read.total("flywheel_caller_tokens_total", type=of_callers) == total
        assert read.total("gen_ai_client_token_usage_sum", gen_ai_token_type=of_callers) == total


@pytest.mark.parametrize("rounds", [2, pytest.param(110, marks=[pytest.mark.thorough, pytest.mark.timeout(900)])])
async def test_counters_agree_exactly_with_mixed_calls(rounds: int, begun: list[str], tmp_path: Path) -> None:
    async with traffic(tmp_path / "keys.json", begun) as (sent, port):
        for _ in range(rounds):
            await sent.ok(6)
            await sent.refused_ones()
            await sent.failed()
            await sent.cancelled_without_request()
            await sent.cancelled_in_prompt()
            await sent.full()
        await sent.slow_reader()
        assert sum(sent.codes.values()) > 90 * rounds
        expected = sum(sent.codes.values())

        async def all_ended() -> bool:
            read = await figures(port)
            return sum(read.total("rpc_server_call_duration_seconds_count", rpc_method=each) for each in GENERATING) == expected

        await until(all_ended, "all calls are counted")
        check(await figures(port), sent)


async def test_a_chat_is_counted_as_one_and_a_call_that_generates_nothing_as_none() -> None:
    (port,) = free_ports(1)
    async with serving(ScriptedEngine(), metrics_address=f"127.0.0.1:{port}") as target:
        chat = pb.GenerationRequest(messages=[pb.Message(role="user", content="x")], max_tokens=1)
        assert await code_of(target.stub.GenerateAll(chat)) is OK_CODE
        await target.stub.Tokenize(pb.TokenizeRequest(text="x"))
        await target.stub.GetModel(pb.GetModelRequest())
        read = await figures(port)
    assert read.by("gen_ai_server_request_duration_seconds_count", "gen_ai_operation_name") == {"chat": 1}
    assert read.by("gen_ai_client_token_usage_count", "gen_ai_token_type") == {"input": 1, "output": 1}
    assert read.by("rpc_server_call_duration_seconds_count", "rpc_response_status_code") == {"OK": 3}


async def test_methods_that_are_not_the_service_have_the_status_that_their_caller_got() -> None:
    (port,) = free_ports(1)
    async with serving(ScriptedEngine(), metrics_address=f"127.0.0.1:{port}") as target:
        health = health_pb2_grpc.HealthStub(target.channel)
        assert await code_of(health.Check(health_pb2.HealthCheckRequest(service="none"))) is grpc.StatusCode.NOT_FOUND
        for name in ("/flywheel.v1.GenerationService/None", '/"\\None/None'):
            method: Any = target.channel.unary_unary(name)
            assert await code_of(method(b"")) is grpc.StatusCode.UNIMPLEMENTED
        read = await figures(port)
    calls = "rpc_server_call_duration_seconds_count"
    assert read.by(calls, "rpc_method", rpc_response_status_code="NOT_FOUND") == {"grpc.health.v1.Health/Check": 1}
    assert read.by(calls, "rpc_method", rpc_response_status_code="UNIMPLEMENTED") == {"_OTHER": 2}


@pytest.mark.parametrize(
    ("failure", "reason"),
    [("failed", "ENGINE_FAILED"), ("unavailable", "ENGINE_UNAVAILABLE"), ("overloaded", "OVERLOADED")],
)
async def test_a_call_that_ends_badly_after_its_start_has_failed_whatever_its_status(failure: Any, reason: str) -> None:
    (port,) = free_ports(1)
    engine = ScriptedEngine(Script(fail_after=2, failure=failure))
    async with serving(engine, metrics_address=f"127.0.0.1:{port}") as target:
        assert await code_of(target.stub.GenerateAll(OK)) is not OK_CODE
        read = await figures(port)
    assert read.by("flywheel_calls_failed_total", "reason") == {reason: 1}
    assert read.by("flywheel_calls_refused_total", "reason") == {}


async def test_a_call_that_an_engine_refuses_because_it_is_not_set_up_has_failed() -> None:
    class NotSetUp(ScriptedEngine):
        async def generate(self, prepared: PreparedRequest, sink: Sink) -> None:
            raise EngineSetupError("no such class", {})

    (port,) = free_ports(1)
    async with serving(NotSetUp(), metrics_address=f"127.0.0.1:{port}") as target:
        assert await code_of(target.stub.GenerateAll(OK)) is grpc.StatusCode.FAILED_PRECONDITION
        read = await figures(port)
    assert read.by("flywheel_calls_failed_total", "reason") == {"ENGINE_NOT_SET_UP": 1}
