"""The promises of the contract, which every engine keeps."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterable
from typing import Any

import grpc
import grpc.aio
import pytest
from flywheel_proto.v1 import generation_pb2 as pb

from tests.serving import Target, as_dict, drained, until
from tests.thorough import further

# With a special token, so that no chat template is put around it, and a model of any size is sure of how it goes on.
LIST = "<|im_start|>1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13,"
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 24}
ENDLESS: dict[str, Any] = {"text": "Write a very long story about a llama.", "max_tokens": 1500, "num_samples": 4}
METHODS = ["Generate", "GenerateDeltas", "GenerateAll"]


async def samples_of(call: AsyncIterable[pb.GenerationResponseSample]) -> list[pb.GenerationResponseSample]:
    return [sample async for sample in call]


@pytest.mark.parametrize("num_samples", [3, *further([1, 10])])
async def test_each_index_finishes_exactly_once(target: Target, num_samples: int) -> None:
    request = pb.GenerationRequest(text=LIST, max_tokens=8, num_samples=num_samples)
    samples = await samples_of(target.stub.Generate(request))
    assert sorted(sample.index for sample in samples) == list(range(num_samples))
    response = await target.stub.GenerateAll(request)
    assert [sample.index for sample in response.responses] == list(range(num_samples))
    last = [delta.index async for delta in target.stub.GenerateDeltas(request) if delta.finish_reason]
    assert sorted(last) == list(range(num_samples))


@pytest.mark.parametrize("stop", [[], ["<never>", ",,", " \n"]])
async def test_deltas_joined_are_the_text(target: Target, stop: list[str]) -> None:
    request = pb.GenerationRequest(text=LIST, stop=stop, **GREEDY)
    whole = await target.stub.GenerateAll(request)
    text, tokens = "", 0
    async for delta in target.stub.GenerateDeltas(request):
        assert "\ufffd" not in delta.text
        assert delta.text or delta.finish_reason
        assert delta.generated_tokens >= tokens
        text, tokens = text + delta.text, delta.generated_tokens
    assert text == whole.responses[0].text
    assert tokens == whole.responses[0].generated_tokens


async def test_deltas_of_several_samples_are_told_apart(target: Target) -> None:
    request = pb.GenerationRequest(text=LIST, max_tokens=16, num_samples=3, temperature=0.0)
    whole = await target.stub.GenerateAll(request)
    texts: dict[int, str] = defaultdict(str)
    ended: set[int] = set()
    async for delta in target.stub.GenerateDeltas(request):
        assert delta.index not in ended
        texts[delta.index] += delta.text
        if delta.finish_reason:
            assert delta.finished > 0
            assert delta.prompt_tokens == whole.prompt_tokens
            ended.add(delta.index)
    assert texts == {sample.index: sample.text for sample in whole.responses}


async def test_the_last_delta_says_what_the_sample_says(target: Target) -> None:
    request = pb.GenerationRequest(text=LIST, **GREEDY)
    (sample,) = await samples_of(target.stub.Generate(request))
    *others, last = [delta async for delta in target.stub.GenerateDeltas(request)]
    assert (last.finish_reason, last.generated_tokens, last.prompt_tokens) == (
        sample.finish_reason,
        sample.generated_tokens,
        sample.prompt_tokens,
    )
    for number, delta in enumerate(others):
        assert (delta.finish_reason, delta.finished, delta.stop_sequence, delta.seed) == ("", 0, "", 0)
        # The first delta tells what a stream costs that is cancelled, unless the engine does not know it yet.
        assert delta.prompt_tokens in ((0, sample.prompt_tokens) if number == 0 else (0,))


async def test_a_stop_sequence_ends_the_sample_and_is_not_sent(target: Target) -> None:
    full = (await target.stub.GenerateAll(pb.GenerationRequest(text=LIST, **GREEDY))).responses[0]
    tells_which = (await target.stub.GetModel(pb.GetModelRequest())).name != "flywheel-whole"
    for start in range(1, min(12, len(full.text) - 4), 4):
        stop = full.text[start : start + 3]
        request = pb.GenerationRequest(text=LIST, stop=["<never>", stop], **GREEDY)
        (sample,) = await samples_of(target.stub.Generate(request))
        assert sample.text == full.text[: full.text.index(stop)]
        assert (sample.finish_reason, sample.stop_sequence) == ("stop", stop if tells_which else "")
        assert 0 < sample.generated_tokens < full.generated_tokens
        joined = "".join([delta.text async for delta in target.stub.GenerateDeltas(request)])
        assert joined == sample.text


async def test_held_back_text_is_sent_where_max_tokens_ends_the_sample(target: Target) -> None:
    full = (await target.stub.GenerateAll(pb.GenerationRequest(text=LIST, **GREEDY))).responses[0]
    request = pb.GenerationRequest(text=LIST, stop=[full.text[-3:] + "<never>"], **GREEDY)
    (sample,) = await samples_of(target.stub.Generate(request))
    assert (sample.text, sample.finish_reason, sample.stop_sequence) == (full.text, "length", "")


async def test_every_request_id_comes_back(target: Target) -> None:
    request = pb.GenerationRequest(text=LIST, max_tokens=1)
    for method in METHODS:
        call = getattr(target.stub, method)(request, metadata=(("x-request-id", "mine-1"),))
        assert as_dict(await call.initial_metadata())["x-request-id"] == "mine-1"
        await drained(call)
    for unfit in ("", "with space", "x" * 129):
        call = target.stub.GenerateAll(request, metadata=(("x-request-id", unfit),))
        assert as_dict(await call.initial_metadata())["x-request-id"] not in ("", unfit)
        await call
    call = target.stub.GetStats(pb.GetStatsRequest())
    assert as_dict(await call.initial_metadata())["x-request-id"]
    await call


async def test_an_error_carries_the_request_id_too(target: Target) -> None:
    call = target.stub.GenerateAll(pb.GenerationRequest(), metadata=(("x-request-id", "mine-2"),))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    # Nothing came before the status, so that gRPC's own retries may repeat such a call.
    assert not as_dict(caught.value.initial_metadata())
    assert as_dict(caught.value.trailing_metadata())["x-request-id"] == "mine-2"


async def nothing_runs(target: Target) -> bool:
    stats = await target.stub.GetStats(pb.GetStatsRequest())
    return (stats.active, stats.queued, stats.backlog) == (0, 0, 0)


@pytest.mark.parametrize("method", METHODS)
async def test_a_deadline_ends_the_generation(target: Target, method: str) -> None:
    request = pb.GenerationRequest(**ENDLESS)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await drained(getattr(target.stub, method)(request, timeout=0.5))
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: nothing_runs(target), "the generation ends")


@pytest.mark.parametrize("method", METHODS)
async def test_a_cancel_ends_the_generation(target: Target, method: str) -> None:
    call = getattr(target.stub, method)(pb.GenerationRequest(**ENDLESS))

    async def runs() -> bool:
        return bool((await target.stub.GetStats(pb.GetStatsRequest())).active == 1)

    waiting = asyncio.ensure_future(drained(call))
    await until(runs, "the generation runs")
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await until(lambda: nothing_runs(target), "the generation ends")
