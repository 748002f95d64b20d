"""A request is received only from a caller who may call, and must arrive in time."""

import asyncio
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.engines.scripted import ScriptedEngine
from flywheel_server.interceptors import methods
from google.rpc.error_details_pb2 import ErrorInfo

from tests.server.test_errors import details_of
from tests.serving import drained, serving

KEY = "0123456789abcdef"
METHODS = ["Generate", "GenerateDeltas", "GenerateAll", "GetModel", "GetStats", "Tokenize"]
PATH = "/flywheel.v1.GenerationService/"


async def nothing() -> AsyncIterator[bytes]:
    """Sends no message, and does not say that there will be none."""
    await asyncio.Event().wait()
    yield b""


@pytest.mark.parametrize("method", METHODS)
async def test_a_caller_who_may_not_call_is_refused_before_the_request_has_arrived(method: str) -> None:
    async with serving(ScriptedEngine(), api_keys=KEY) as target:
        call = target.channel.stream_stream(PATH + method, bytes, bytes)(nothing())
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(drained(call), 20)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("method", METHODS)
async def test_a_request_that_does_not_arrive_ends_the_call(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "REQUEST_TIMEOUT", 0.05)
    async with serving(ScriptedEngine()) as target:
        call = target.channel.stream_stream(PATH + method, bytes, bytes)(nothing())
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(drained(call), 20)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert details_of(caught.value)[ErrorInfo].reason == "REQUEST_INCOMPLETE"


@pytest.mark.parametrize("method", METHODS)
async def test_a_call_without_a_request_is_an_invalid_argument(method: str) -> None:
    async with serving(ScriptedEngine()) as target:
        call = target.channel.stream_stream(PATH + method, bytes, bytes)()
        await call.done_writing()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await drained(call)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert details_of(caught.value)[ErrorInfo].reason == "MALFORMED_REQUEST"


async def test_messages_after_the_request_are_not_read() -> None:
    request = pb.GenerationRequest(text="x", max_tokens=1).SerializeToString()
    async with serving(ScriptedEngine()) as target:
        call = target.channel.stream_stream(PATH + "GenerateAll", bytes, bytes)(iter([request, b"\xff", request]))
        answers = [answer async for answer in call]
    (answer,) = answers
    assert pb.GenerationResponse.FromString(answer).num_samples == 1
