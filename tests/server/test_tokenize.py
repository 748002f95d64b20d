"""Tokenize: bounded and charged like the prompt of a generation, and nothing of a call is left behind."""

import asyncio
import re
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.access.callers import ANYBODY, Caller
from flywheel_server.access.keys_file import KeysFile
from flywheel_server.admission import MIN_MEASURED_CALLS, Admission
from flywheel_server.admission_control import LocalAdmissionControl
from flywheel_server.engines.base import EngineFailedError, EngineStats, PreparedRequest, PromptToken, UnsupportedMethodError
from flywheel_server.engines.scripted import Script, ScriptedEngine
from flywheel_server.generations import Generations
from flywheel_server.messages import GenerationRequest
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo

from tests.access.test_quotas import keys_for
from tests.server.test_errors import details_of, details_of_a_deadline
from tests.server.test_reading import PATH
from tests.serving import Target, code_of, connected, drained, serving, until

HELLO = pb.TokenizeRequest(text="hello, llama")


class Tokenizer(ScriptedEngine):
    """Tells the tokens of a prompt. A call with the prompt `wait` waits until it is cancelled."""

    waiting = 0

    async def tokenize(self, prepared: PreparedRequest) -> Sequence[PromptToken]:
        if prepared.request.text == "wait":
            self.waiting += 1
            try:
                await asyncio.Event().wait()
            finally:
                self.waiting -= 1
        return [PromptToken(2**17 + number, b"llam") for number in prepared.prompt]

    async def has_begun(self, target: Target, metadata: Any = None) -> Any:
        """Returns a call that waits in the engine."""
        call = target.stub.Tokenize(pb.TokenizeRequest(text="wait"), metadata=metadata)
        await until(lambda: self.waiting == 1, "the engine works on the call")
        return call


class Failing(ScriptedEngine):
    """Fails to tell the tokens of a prompt, or how busy it is."""

    checks = 0
    error: BaseException

    async def tokenize(self, prepared: PreparedRequest) -> Sequence[PromptToken]:
        raise self.error

    async def stats(self) -> EngineStats:
        raise self.error

    async def check(self) -> None:
        self.checks += 1


class Unable(ScriptedEngine):
    """Cannot tell the tokens of a prompt."""

    async def tokenize(self, prepared: PreparedRequest) -> Sequence[PromptToken]:
        del prepared
        raise UnsupportedMethodError("Tokenize")


async def refused(call: Any) -> tuple[grpc.StatusCode, dict[Any, Any]]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await drained(call)
    return caught.value.code(), details_of(caught.value)


async def is_idle(target: Target, metadata: Any = None) -> bool:
    stats = await target.stub.GetStats(pb.GetStatsRequest(), metadata=metadata)
    return (stats.active, stats.queued) == (0, 0)


FAULTS = [SystemExit(3), asyncio.CancelledError(), EngineFailedError("x"), KeyError("x")]


@pytest.mark.parametrize("error", FAULTS, ids=repr)
async def test_an_engine_that_fails_to_tokenize_fails_the_call_alone_and_is_checked(error: BaseException) -> None:
    engine = Failing()
    engine.error = error
    async with serving(engine) as target:
        for _ in range(2):
            code, details = await refused(target.stub.Tokenize(HELLO, timeout=10))
            assert (code, details[ErrorInfo].reason) == (grpc.StatusCode.INTERNAL, "ENGINE_FAILED")
        await until(lambda: engine.checks > 1, "the engine is checked again")


@pytest.mark.parametrize("error", FAULTS, ids=repr)
async def test_an_engine_that_cannot_say_how_busy_it_is_ends_nothing(error: BaseException) -> None:
    engine = Failing()
    engine.error = error
    async with serving(engine, health_interval=0.01) as target:
        code, details = await refused(target.stub.GetStats(pb.GetStatsRequest(), timeout=10))
        assert (code, details[ErrorInfo].reason) == (grpc.StatusCode.INTERNAL, "ENGINE_FAILED")
        answer = await target.stub.GenerateAll(pb.GenerationRequest(text="x", max_tokens=1))
        assert len(answer.responses) == 1


@pytest.mark.parametrize("tokenizers", [0, 2])
async def test_the_count_is_that_of_a_generation(tokenizers: int) -> None:
    async with serving(Tokenizer(Script(tokenizers=tokenizers))) as target:
        response = await target.stub.Tokenize(HELLO)
        sample = await target.stub.GenerateAll(pb.GenerationRequest(text=HELLO.text, max_tokens=1))
        assert response.prompt_tokens == len(response.tokens) == sample.prompt_tokens == 3
        assert response.tokens[1] == pb.PromptToken(id=2**17 + 1, text=b"llam")
        assert await is_idle(target)


@pytest.mark.parametrize("tokenizers", [0, 2])
async def test_the_tokens_count_against_the_quota(tokenizers: int, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    with keys_for(file, small={"tokens_per_minute": 60}) as metadata:
        async with serving(Tokenizer(Script(tokenizers=tokenizers)), api_keys_file=str(file)) as target:
            half = pb.TokenizeRequest(text="llam" * 40)
            for _ in range(2):
                await target.stub.Tokenize(half, metadata=metadata["small"])
            code, details = await refused(target.stub.Tokenize(half, metadata=metadata["small"]))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details[ErrorInfo].reason == "QUOTA_EXCEEDED"


async def test_a_prompt_that_leaves_no_room_is_refused_with_both_numbers() -> None:
    async with serving(Tokenizer(Script(context_tokens=10))) as target:
        assert (await target.stub.Tokenize(pb.TokenizeRequest(text="x" * 36))).prompt_tokens == 9
        code, details = await refused(target.stub.Tokenize(pb.TokenizeRequest(text="x" * 40)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    (violation,) = details[BadRequest].field_violations
    assert violation.field == "text"
    assert violation.description.startswith("is 10 tokens long, and must leave room for a token in the context of 10 tokens")


@pytest.mark.parametrize("request_", [pb.TokenizeRequest(), pb.TokenizeRequest(text="x", messages=[pb.Message(role="user")])])
async def test_a_request_needs_exactly_one_prompt(request_: pb.TokenizeRequest) -> None:
    async with serving(Tokenizer()) as target:
        code, details = await refused(target.stub.Tokenize(request_))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    named = [violation.field for violation in details[BadRequest].field_violations]
    assert named == (["text", "messages"] if request_.text else ["text"])


@pytest.mark.parametrize(
    "request_",
    [
        pb.TokenizeRequest(),
        pb.TokenizeRequest(text="x" * 40_000),
        pb.TokenizeRequest(text="x" * 2**21),
        pb.TokenizeRequest(messages=[pb.Message(role="user", content="x" * 40_000)]),
        pb.TokenizeRequest(text="x", messages=[pb.Message(role="user")]),
        pb.TokenizeRequest(messages=[pb.Message(role="X"), pb.Message()]),
        pb.TokenizeRequest(messages=[pb.Message(role="user")] * 257),
    ],
    ids=lambda request: str(request)[:30],
)
async def test_a_refusal_names_only_fields_of_the_request(request_: pb.TokenizeRequest) -> None:
    own = {field.name for field in pb.TokenizeRequest.DESCRIPTOR.fields}
    others = {field.name for field in pb.GenerationRequest.DESCRIPTOR.fields} - own
    async with serving(Tokenizer()) as target:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await target.stub.Tokenize(request_)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    violations = details_of(caught.value)[BadRequest].field_violations
    said = " ".join([caught.value.details() or "", *(f"{each.field} {each.description}" for each in violations)])
    assert not others & {*re.findall(r"\w+", said)}
    assert {re.split(r"[.\[]", each.field)[0] for each in violations} <= own


async def test_an_engine_without_it_says_so() -> None:
    async with serving(Unable()) as target:
        code, details = await refused(target.stub.Tokenize(HELLO))
    assert code is grpc.StatusCode.UNIMPLEMENTED
    assert details[ErrorInfo].reason == "UNSUPPORTED_METHOD"


async def test_it_is_no_service_time() -> None:
    admission = Admission(1, max_queued=0)
    async with Tokenizer(Script(tokenizers=1)) as engine:
        generations = Generations(engine, LocalAdmissionControl(admission))
        generations.open()
        told: list[Sequence[PromptToken]] = []

        async def deliver(tokens: Sequence[PromptToken]) -> None:
            assert generations.queued == 1
            told.append(tokens)

        for _ in range(MIN_MEASURED_CALLS):
            await generations.tokenize(GenerationRequest(text="x", max_tokens=1), ANYBODY, None, deliver)
        assert len(told) == MIN_MEASURED_CALLS
        assert admission.service_times.of(ANYBODY.name) is None
        assert (generations.queued, generations.active, admission.queued, admission.active) == (0, 0, 0, 0)


async def test_it_has_a_place_in_the_queue_and_needs_no_slot() -> None:
    engine = Tokenizer(Script(token_delay=0.01))
    async with serving(engine, max_concurrent=1, max_queued=1) as target:
        running = target.stub.GenerateDeltas(pb.GenerationRequest(text="x", max_tokens=8000))
        await running.read()
        assert (await target.stub.Tokenize(HELLO)).prompt_tokens == 3
        waiting = await engine.has_begun(target)
        code, details = await refused(target.stub.Tokenize(HELLO))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert details[ErrorInfo].reason == "OVERLOADED"
        waiting.cancel()
        running.cancel()
        await until(lambda: is_idle(target), "nothing is left")
        assert engine.waiting == 0


async def test_a_deadline_ends_it() -> None:
    async with serving(Tokenizer()) as target:
        wait = pb.TokenizeRequest(text="wait")
        details = await details_of_a_deadline(lambda: target.stub.Tokenize(wait, timeout=0.5))
        assert details[ErrorInfo].reason == "IN_QUEUE"
        await until(lambda: is_idle(target), "nothing is left")


async def test_a_revoked_key_ends_it(tmp_path: Path) -> None:
    file, engine = tmp_path / "keys.json", Tokenizer()
    with keys_for(file, leaving={}, staying={}) as metadata:
        async with serving(engine, api_keys_file=str(file)) as target:
            call = await engine.has_begun(target, metadata["leaving"])
            KeysFile(keys=tuple(key for key in KeysFile.read(file).keys if key.name == "staying")).write(file)
            code, details = await refused(call)
            assert code is grpc.StatusCode.UNAUTHENTICATED
            assert details[ErrorInfo].reason == "API_KEY_REVOKED"
            await until(lambda: is_idle(target, metadata["staying"]), "nothing is left")


async def test_a_server_that_stops_ends_it_after_the_drain() -> None:
    engine = Tokenizer()
    async with AsyncExitStack() as after:
        async with serving(engine, drain_timeout=0.1) as target:
            call = await engine.has_begun(await after.enter_async_context(connected(target.address)))
        assert await code_of(call) is grpc.StatusCode.UNAVAILABLE


async def test_a_client_takes_the_tokens_of_a_large_context() -> None:
    async with serving(Tokenizer(Script(context_tokens=2**17, bytes_per_token=1))) as target:
        response = await target.stub.Tokenize(pb.TokenizeRequest(text="x" * (2**17 - 1)))
    assert response.prompt_tokens == 2**17 - 1
    assert response.ByteSize() < 4 * 2**20, "what gRPC's clients take if they say nothing else"


async def test_a_reader_that_stops_loses_the_answer() -> None:
    engine = Tokenizer(Script(context_tokens=2**17, bytes_per_token=1))
    async with (
        serving(engine, slow_reader_timeout=0.3) as target,
        connected(target.address, ("grpc.http2.bdp_probe", 0), ("grpc.use_local_subchannel_pool", 1)) as reader,
    ):
        request = pb.TokenizeRequest(text="x" * (2**17 - 1)).SerializeToString()
        call = reader.channel.unary_stream(PATH + "Tokenize", bytes, bytes)(request)
        await call.initial_metadata()
        await until(lambda: is_idle(target), "the server ends the call although the caller reads nothing")
        code, details = await refused(call)
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details[ErrorInfo].reason == "SLOW_READER"


@pytest.mark.parametrize("tokenizers", [0, 1])
async def test_priority_lets_other_calls_go_first(tokenizers: int) -> None:
    admission = Admission(1, max_queued=8)
    async with Tokenizer(Script(tokenizers=tokenizers, token_delay=0.001)) as engine:
        generations = Generations(engine, LocalAdmissionControl(admission))
        generations.open()
        started: list[str] = []
        end = asyncio.Event()

        async def call(text: str, priority: int = 0, caller: Caller = ANYBODY) -> None:
            async def deliver(_: object) -> None:
                started.append(text)
                if text == "first":
                    await end.wait()

            await generations.run(GenerationRequest(text=text, max_tokens=1, priority=priority), caller, None, deliver)

        calls = [asyncio.create_task(call("first"))]
        await until(lambda: started == ["first"], "it runs")
        for number, (text, priority, own) in enumerate(
            [("last", -5, 0), ("middle", -1, 0), ("same", 0, 0), ("other key", 0, 1), ("other key behind", -2, 1)], 1
        ):
            calls.append(asyncio.create_task(call(text, priority, Caller(str(own), own))))
            await until(lambda number=number: admission.queued == number, "it waits")  # type: ignore[misc]
        end.set()
        await asyncio.gather(*calls)
    assert started == ["first", "other key", "same", "middle", "other key behind", "last"]
