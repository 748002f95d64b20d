"""The table of errors: every exception has its row, and every row reaches the caller as it is written."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio
import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.engines import base
from flywheel_server.engines.scripted import Script, ScriptedEngine
from flywheel_server.errors import TABLE
from flywheel_server.messages import GenerationResponseSample
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, QuotaFailure, RetryInfo
from google.rpc.status_pb2 import Status
from structlog.testing import capture_logs

from tests.pulled import PulledEngine
from tests.serving import as_dict, drained, serving, until

METHODS = ["Generate", "GenerateDeltas", "GenerateAll"]
REQUEST = pb.GenerationRequest(text="hello", max_tokens=20, num_samples=2)

INTERNALS = "what only the log may say"


class FailingEngine(PulledEngine):
    """Raises an error after `after` events."""

    def __init__(self, error: Exception, after: int = 0) -> None:
        super().__init__()
        self.error = error
        self.after = after

    async def events(self, prepared: base.PreparedRequest) -> Any:
        if prepared.request.text != "check":
            seen = 0
            async for event in super().events(prepared):
                if seen == self.after:
                    raise self.error
                seen += 1
                yield event
        else:
            async for event in super().events(prepared):
                yield event


def details_of(error: grpc.aio.AioRpcError) -> dict[type[Message], Any]:
    metadata = as_dict(error.trailing_metadata())
    assert metadata["x-request-id"]
    status = Status.FromString(metadata["grpc-status-details-bin"])
    assert status.code == error.code().value[0]
    assert status.message == error.details()
    found: dict[type[Message], Any] = {}
    for packed in status.details:
        for kind in (BadRequest, ErrorInfo, QuotaFailure, RetryInfo):
            message = kind()
            if packed.Unpack(message):
                found[kind] = message
    assert len(found) == len(status.details)
    delay = found[RetryInfo].retry_delay.ToMilliseconds() if RetryInfo in found else None
    assert metadata.get("grpc-retry-pushback-ms") == (None if delay is None else str(delay))
    return found


async def details_of_a_deadline(make: Callable[[], Any]) -> dict[type[Message], Any]:
    """Returns the details of a call that outlasts its deadline. Repeats the call if the client's own timer was first."""
    for _ in range(10):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await drained(make())
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        if "grpc-status-details-bin" in as_dict(caught.value.trailing_metadata()):
            return details_of(caught.value)
    raise AssertionError("the server is always late")


SETUP = grpc.StatusCode.FAILED_PRECONDITION

ROWS = [
    (base.PromptTooLongError(9000, 5, 8192), grpc.StatusCode.INVALID_ARGUMENT, None),
    (base.UnsupportedFieldError("top_k", "it samples elsewhere"), grpc.StatusCode.INVALID_ARGUMENT, "UNSUPPORTED_FIELD"),
    (base.EngineOverloadedError(INTERNALS, 2.5), grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED"),
    (base.EngineUnavailableError(INTERNALS, 2.5), grpc.StatusCode.UNAVAILABLE, "ENGINE_UNAVAILABLE"),
    (base.EngineTimeoutError(600), grpc.StatusCode.DEADLINE_EXCEEDED, "ENGINE_TIMEOUT"),
    (base.EngineSetupError("no such class", {"app": "a", "setting": "FLYWHEEL_MODAL_APP"}), SETUP, "ENGINE_NOT_SET_UP"),
    (base.EngineFailedError(INTERNALS), grpc.StatusCode.INTERNAL, "ENGINE_FAILED"),
    (RuntimeError(INTERNALS), grpc.StatusCode.INTERNAL, "ENGINE_FAILED"),
    (TimeoutError(INTERNALS), grpc.StatusCode.INTERNAL, "ENGINE_FAILED"),
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("after", [0, 1, 7])
@pytest.mark.parametrize(("error", "code", "reason"), ROWS, ids=lambda row: type(row).__name__)
async def test_each_row_reaches_the_caller(
    error: Exception, code: grpc.StatusCode, reason: str | None, after: int, method: str
) -> None:
    async with serving(FailingEngine(error, after)) as target:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await drained(getattr(target.stub, method)(REQUEST, metadata=(("x-request-id", "id-1"),)))
        assert caught.value.code() is code
        details = details_of(caught.value)
        assert INTERNALS not in str(details) + str(caught.value.details())
        assert "hello" not in str(details) + str(caught.value.details())
        if reason:
            assert (details[ErrorInfo].reason, details[ErrorInfo].domain) == (reason, "flywheel.v1")
        if code is grpc.StatusCode.INVALID_ARGUMENT:
            assert details[BadRequest].field_violations
        if code in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED}:
            assert details[RetryInfo].retry_delay.ToNanoseconds() == 2_500_000_000
        if code is grpc.StatusCode.INTERNAL:
            assert details[ErrorInfo].metadata["request_id"] == "id-1"
        if reason == "ENGINE_TIMEOUT":
            assert details[ErrorInfo].metadata == {"timeout_seconds": "600"}
        if code is SETUP:
            assert details[ErrorInfo].metadata == {"app": "a", "setting": "FLYWHEEL_MODAL_APP"}
        stats = await target.stub.GetStats(pb.GetStatsRequest())
        assert (stats.active, stats.queued) == (0, 0)


@pytest.mark.parametrize(
    ("script", "reason"),
    [(Script(slots=1, hang_after=0), "IN_QUEUE"), (Script(hang_after=3), "IN_GENERATION")],
)
@pytest.mark.parametrize("method", METHODS)
async def test_a_deadline_says_whether_the_call_was_in_the_queue_or_in_generation(
    script: Script, reason: str, method: str
) -> None:
    engine = ScriptedEngine(script)
    async with serving(engine) as target:
        first = target.stub.GenerateAll(REQUEST) if reason == "IN_QUEUE" else None
        if first:
            await until(lambda: engine.running == 1, "the slot is taken")
        details = await details_of_a_deadline(lambda: getattr(target.stub, method)(REQUEST, timeout=0.6))
        assert details[ErrorInfo].reason == reason
        if first:
            first.cancel()


class ForgetfulEngine(PulledEngine):
    """Breaks the promise of one finished sample for each index."""

    def __init__(self, *indexes: int) -> None:
        super().__init__()
        self.indexes = indexes

    async def events(self, prepared: base.PreparedRequest) -> Any:
        yield base.Started()
        for index in self.indexes:
            yield GenerationResponseSample(text="", generated_tokens=1, finished=1.0, finish_reason="stop", index=index)

    async def check(self) -> None:
        pass


@pytest.mark.parametrize("indexes", [(), (0,), (0, 0), (0, 2), (0, 1, 1)])
@pytest.mark.parametrize("method", METHODS)
async def test_an_engine_that_breaks_its_promise_is_an_error(indexes: tuple[int, ...], method: str) -> None:
    async with serving(ForgetfulEngine(*indexes)) as target:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await drained(getattr(target.stub, method)(REQUEST))
        assert caught.value.code() is grpc.StatusCode.INTERNAL


@pytest.mark.parametrize("form", ["text", "json"])
def test_the_log_has_the_cause_but_no_prompt_and_no_text(form: str) -> None:
    program = """
import asyncio, sys
from flywheel_server import logs
from flywheel_server.engines.scripted import Script, ScriptedEngine
from flywheel_proto.v1 import generation_pb2 as pb
from tests.serving import drained, serving
from tests.pulled import PulledEngine

async def main():
    async with serving(ScriptedEngine(Script(text="SECRET-SAMPLE ", fail_after=5))) as target:
        try:
            await drained(target.stub.GenerateDeltas(pb.GenerationRequest(text="SECRET-PROMPT", max_tokens=20)))
        except Exception:
            pass

logs.configure("info", sys.argv[1])
asyncio.run(main())
"""
    ran = subprocess.run([sys.executable, "-c", program, form], capture_output=True, text=True, check=True)
    assert "the script says so" in ran.stderr
    assert "EngineFailedError" in ran.stderr
    assert "SECRET" not in ran.stderr


async def test_the_log_has_prompts_only_if_the_settings_ask_for_them() -> None:
    for asked in (False, True):
        with capture_logs() as logs:
            async with serving(ScriptedEngine(), log_prompts=asked) as target:
                await target.stub.GenerateAll(pb.GenerationRequest(text="SECRET-PROMPT", max_tokens=2))
        assert ("SECRET-PROMPT" in str(logs)) == asked


def test_every_engine_error_has_a_row() -> None:
    def leaves(kind: type[Exception]) -> set[type[Exception]]:
        below = [leaf for subclass in kind.__subclasses__() for leaf in leaves(subclass)]
        return set(below) or {kind}

    ours = {kind for kind in leaves(base.EngineError) if kind.__module__.startswith("flywheel_server.")}
    assert ours <= TABLE.keys()
