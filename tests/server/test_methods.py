"""A method of a servicer that does not write its answer fails at its first call, and the log says what to do."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.engines.scripted import ScriptedEngine
from flywheel_server.health import HealthServicer
from flywheel_server.interceptors.calls import CallInterceptor
from flywheel_server.reflection import ReflectionServicer
from flywheel_server.service import GenerationService
from google.rpc.error_details_pb2 import ErrorInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from structlog.testing import capture_logs

from tests.server.test_errors import details_of
from tests.serving import Target, drained, serving

ANSWER = pb.Model()


async def returns(self: Any, request: Any, context: Any) -> Any:
    await asyncio.sleep(0)
    return ANSWER


async def writes_and_returns(self: Any, request: Any, context: Any) -> Any:
    await context.write(ANSWER)
    return ANSWER


async def yields(self: Any, request: Any, context: Any) -> AsyncIterator[Any]:
    yield ANSWER


def is_not_async(self: Any, request: Any, context: Any) -> Any:
    return ANSWER


def is_not_async_and_returns_nothing(self: Any, request: Any, context: Any) -> None:
    return None


def yields_and_is_not_async(self: Any, request: Any, context: Any) -> Iterator[Any]:
    yield ANSWER


SHAPES = [
    returns,
    writes_and_returns,
    yields,
    is_not_async,
    is_not_async_and_returns_nothing,
    yields_and_is_not_async,
]


def begin(target: Target, servicer: type, method: str) -> Any:
    if servicer is HealthServicer:
        return getattr(health_pb2_grpc.HealthStub(target.channel), method)(health_pb2.HealthCheckRequest())
    if servicer is ReflectionServicer:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(target.channel)
        return stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    request = pb.GenerationRequest(text="x", max_tokens=1)
    requests = {"GetModel": pb.GetModelRequest(), "GetStats": pb.GetStatsRequest()}
    return getattr(target.stub, method)(requests.get(method, request))


@asynccontextmanager
async def serving_with(servicer: type, method: str, shape: Any) -> AsyncIterator[Target]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(servicer, method, shape)
        async with serving(ScriptedEngine()) as target:
            yield target


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("servicer", "method"),
    [
        *((GenerationService, method) for method in ("Generate", "GenerateDeltas", "GenerateAll", "GetModel", "GetStats")),
        *((HealthServicer, method) for method in ("Check", "Watch")),
        (ReflectionServicer, "ServerReflectionInfo"),
    ],
)
async def test_a_method_that_does_not_write_its_answer_fails_at_its_first_call(servicer: type, method: str, shape: Any) -> None:
    with capture_logs() as logs:
        async with serving_with(servicer, method, shape) as target:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await asyncio.wait_for(drained(begin(target, servicer, method)), 20)
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert details_of(caught.value)[ErrorInfo].reason == "ENGINE_FAILED"
    (line,) = [line for line in logs if line["event"] == "call failed"]
    assert "await context.write(answer)" in line["cause"]
    assert shape.__name__ in line["cause"]


async def test_the_handler_of_a_method_is_wrapped_once_and_none_is_kept_for_an_unknown_method(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked_up: list[str] = []
    original = CallInterceptor.intercept_service

    async def spy(self: CallInterceptor, continuation: Any, details: Any) -> Any:
        async def seen(details: Any) -> Any:
            looked_up.append(details.method)
            return await continuation(details)

        return await original(self, seen, details)

    monkeypatch.setattr(CallInterceptor, "intercept_service", spy)
    async with serving(ScriptedEngine()) as target:
        for _ in range(2):
            await target.stub.GetModel(pb.GetModelRequest())
        assert looked_up == ["/flywheel.v1.GenerationService/GetModel"]
        for _ in range(2):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await target.channel.unary_unary("/x/y", bytes, bytes)(b"")
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert looked_up[1:] == ["/x/y", "/x/y"]
