"""Whatever bytes arrive, the answer is a clear status, and the server goes on serving."""

import random

import grpc
import grpc.aio
import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.engines.scripted import Script, ScriptedEngine
from google.rpc.error_details_pb2 import ErrorInfo

from tests.server.test_errors import details_of
from tests.serving import Target, drained, serving, until

PATH = "/flywheel.v1.GenerationService/"
# Field 1 is `text`, length 2, and the bytes are no UTF-8.
NOT_UTF8 = b"\x0a\x02\xc3\x28\x10\x01"


async def send(target: Target, method: str, data: bytes) -> None:
    kind = target.channel.unary_unary if method.startswith("Get") or method == "GenerateAll" else target.channel.unary_stream
    await drained(kind(PATH + method, bytes, bytes)(data))


@pytest.mark.parametrize("method", ["Generate", "GenerateDeltas", "GenerateAll"])
@pytest.mark.parametrize("data", [b"\xff", b"\x0a\xff", b"\x0a\x05ab", NOT_UTF8, bytes(1000)])
async def test_bytes_that_are_no_message_are_an_invalid_argument(data: bytes, method: str) -> None:
    async with serving(ScriptedEngine()) as target:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await send(target, method, data)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert details_of(caught.value)[ErrorInfo].reason == "MALFORMED_REQUEST"


async def test_random_bytes_never_break_it() -> None:
    rng = random.Random(11)
    valid = pb.GenerationRequest(text="hello", max_tokens=3, stop=["a"], top_p=0.5, eos_token_ids=[1, 2]).SerializeToString()
    allowed = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OK}
    seen = set()
    async with serving(ScriptedEngine(Script(context_tokens=64))) as target:
        for _ in range(1500):
            data = bytearray(rng.randbytes(rng.randint(0, 60)) if rng.random() < 0.3 else valid)
            for _ in range(rng.randint(0, 6)):
                if data:
                    data[rng.randrange(len(data))] = rng.randrange(256)
            try:
                await send(target, rng.choice(["Generate", "GenerateDeltas", "GenerateAll"]), bytes(data))
                seen.add(grpc.StatusCode.OK)
            except grpc.aio.AioRpcError as error:
                seen.add(error.code())
        assert seen == allowed
        response = await target.stub.GenerateAll(pb.GenerationRequest(text="hello", max_tokens=3))
        assert response.num_samples == 1


async def test_a_message_over_the_limit_is_refused_and_one_at_it_is_not() -> None:
    async with serving(
        ScriptedEngine(Script(context_tokens=2**30)), max_message_bytes=100_000, max_text_bytes=99_000
    ) as target:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await target.stub.GenerateAll(pb.GenerationRequest(text="x" * 100_001, max_tokens=1))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "100000" in str(caught.value.details())
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await target.stub.GenerateAll(pb.GenerationRequest(text="x" * 99_001, max_tokens=1))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        response = await target.stub.GenerateAll(pb.GenerationRequest(text="x" * 99_000, max_tokens=1))
        assert response.prompt_tokens == 99_000 // 4


async def test_a_response_may_be_larger_than_grpcs_default() -> None:
    text = "x" * 1_000_000
    async with serving(ScriptedEngine(Script(text=text, bytes_per_token=1_000_000))) as target:
        options = [("grpc.max_receive_message_length", -1)]
        async with grpc.aio.insecure_channel(target.address, options=options) as channel:
            call = channel.unary_unary(
                PATH + "GenerateAll", pb.GenerationRequest.SerializeToString, pb.GenerationResponse.FromString
            )
            response = await call(pb.GenerationRequest(text="x", max_tokens=6))
        assert response.responses[0].text == text * 6


async def test_an_unknown_method_is_unimplemented() -> None:
    async with serving(ScriptedEngine()) as target:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await send(target, "GetNothing", b"")
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_text_is_sent_as_soon_as_it_exists() -> None:
    engine = ScriptedEngine(Script(hang_after=3))
    async with serving(engine) as target:
        call = target.stub.GenerateDeltas(pb.GenerationRequest(text="x", max_tokens=50))
        tokens = 0
        while tokens < 3:
            tokens = (await call.read()).generated_tokens
        assert engine.running == 1, "the engine still generates"
        call.cancel()
        await until(lambda: engine.running == 0, "it ends")


async def test_deltas_are_merged_only_while_the_reader_is_behind() -> None:
    request = pb.GenerationRequest(text="x", max_tokens=4000, num_samples=2)
    async with serving(ScriptedEngine(Script(text="abcd" * 100))) as target:
        behind = [delta async for delta in target.stub.GenerateDeltas(request)]
    assert len(behind) < request.max_tokens, "tokens come faster than messages can be written"
    assert sum(len(delta.text) for delta in behind) == 2 * 4 * request.max_tokens
    request.max_tokens = 40
    async with serving(ScriptedEngine(Script(text="abcd" * 100, token_delay=0.01))) as target:
        keeping_up = [delta async for delta in target.stub.GenerateDeltas(request)]
    texts = [delta for delta in keeping_up if delta.text]
    assert len(texts) > 0.7 * 2 * request.max_tokens, "a pause of the machine may merge some"


@pytest.mark.parametrize(("min_ping_interval", "code"), [(0.01, grpc.StatusCode.OK), (10.0, grpc.StatusCode.UNAVAILABLE)])
async def test_a_client_may_ping_through_a_long_silence(min_ping_interval: float, code: grpc.StatusCode) -> None:
    options = [("grpc.keepalive_time_ms", 50), ("grpc.http2.max_pings_without_data", 0)]
    async with (
        serving(ScriptedEngine(Script(prompt_delay=5)), min_ping_interval=min_ping_interval) as target,
        grpc.aio.insecure_channel(target.address, options=options) as channel,
    ):
        call = channel.unary_unary(
            PATH + "GenerateAll", pb.GenerationRequest.SerializeToString, pb.GenerationResponse.FromString
        )(pb.GenerationRequest(text="x", max_tokens=1))
        assert await call.code() is code, await call.details()
