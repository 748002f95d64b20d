"""A server with API keys answers only callers who send one; health and reflection answer everybody."""

from typing import Any

import grpc
import grpc.aio
import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.engines.scripted import ScriptedEngine
from flywheel_server.settings import Settings, parse
from google.rpc.error_details_pb2 import ErrorInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.server.test_errors import details_of
from tests.serving import drained, serving

KEY = "0123456789abcdef"
OTHER = "fedcba9876543210"
GENERATION = pb.GenerationRequest(text="x", max_tokens=1)
CALLS = {
    "Generate": GENERATION,
    "GenerateDeltas": GENERATION,
    "GenerateAll": GENERATION,
    "GetModel": pb.GetModelRequest(),
    "GetStats": pb.GetStatsRequest(),
}


@pytest.mark.parametrize("method", CALLS)
@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (None, "API_KEY_MISSING"),
        ("", "API_KEY_MISSING"),
        ("Bearer", "API_KEY_MISSING"),
        ("Bearer ", "API_KEY_MISSING"),
        (KEY, "API_KEY_MISSING"),
        (f"Basic {KEY}", "API_KEY_MISSING"),
        (f"Bearer {KEY[:-1]}", "API_KEY_INVALID"),
        (f"Bearer {KEY}0", "API_KEY_INVALID"),
        (f"Bearer {KEY},{OTHER}", "API_KEY_INVALID"),
    ],
)
async def test_without_a_key_no_call(method: str, sent: str | None, reason: str) -> None:
    async with serving(ScriptedEngine(), api_keys=f"{KEY}, {OTHER}") as target:
        metadata = () if sent is None else (("authorization", sent),)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await drained(getattr(target.stub, method)(CALLS[method], metadata=metadata))
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert details_of(caught.value)[ErrorInfo].reason == reason
        assert KEY not in str(caught.value)


@pytest.mark.parametrize("method", CALLS)
@pytest.mark.parametrize("sent", [f"Bearer {KEY}", f"bearer {OTHER}"])
async def test_with_a_key(method: str, sent: str) -> None:
    async with serving(ScriptedEngine(), api_keys=f"{KEY},{OTHER}") as target:
        await drained(getattr(target.stub, method)(CALLS[method], metadata=(("authorization", sent),)))


async def test_health_and_reflection_need_none() -> None:
    async with serving(ScriptedEngine(), api_keys=KEY) as target:
        health = await health_pb2_grpc.HealthStub(target.channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        reflection: Any = reflection_pb2_grpc.ServerReflectionStub(target.channel)
        asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        answers = [answer async for answer in reflection.ServerReflectionInfo(asked)]
        assert "GenerationService" in str(answers)


def test_keys_come_from_the_environment_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FLYWHEEL_API_KEYS", f" {KEY} , {OTHER},")
    settings = parse([])
    assert [key.get_secret_value() for key in settings.api_keys] == [KEY, OTHER]
    assert KEY not in repr(settings) + str(settings)
    with pytest.raises(SystemExit):
        parse(["--api-keys", KEY])


@pytest.mark.parametrize("keys", ["short", f"{KEY},with a space in it", "é" * 20])
def test_a_key_that_is_no_key_is_refused_and_not_printed(
    keys: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLYWHEEL_API_KEYS", keys)
    with pytest.raises(SystemExit):
        parse([])
    message = capsys.readouterr().err
    assert "FLYWHEEL_API_KEYS" in message
    assert "16 visible ASCII characters" in message
    assert keys.rsplit(",", maxsplit=1)[-1] not in message


def test_no_keys_by_default() -> None:
    assert Settings().api_keys == ()
