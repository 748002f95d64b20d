"""A time limit ends a sample wherever it is: while its prompt waits or is read, and while text is generated."""

import asyncio

import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.engines.llama_cpp.engine import EmbeddedEngine

from tests.engines.llama_cpp.conftest import Work
from tests.serving import Target, until
from tests.thorough import further

LONG = "word " * 2500


async def samples_by(method: str, target: Target, request: pb.GenerationRequest) -> list[pb.GenerationResponseSample]:
    if method == "GenerateAll":
        return [*(await target.stub.GenerateAll(request)).responses]
    if method == "Generate":
        return sorted([sample async for sample in target.stub.Generate(request)], key=lambda sample: sample.index)
    samples: dict[int, pb.GenerationResponseSample] = {}
    async for delta in target.stub.GenerateDeltas(request):
        sample = samples.setdefault(delta.index, pb.GenerationResponseSample(index=delta.index))
        sample.text += delta.text
        sample.generated_tokens = delta.generated_tokens
        sample.finish_reason = delta.finish_reason
    return [samples[index] for index in sorted(samples)]


@pytest.mark.parametrize("method", ["GenerateAll", *further(["Generate", "GenerateDeltas"])])
async def test_a_sample_ends_with_the_text_so_far(embedded: EmbeddedEngine, embedded_target: Target, method: str) -> None:
    request = pb.GenerationRequest(text="1, 2, 3,", max_tokens=1000, num_samples=2, temperature=0.0, time_limit=0.3)
    for sample in await samples_by(method, embedded_target, request):
        assert sample.finish_reason == "time"
        assert sample.generated_tokens == len(embedded._llama.tokenize(sample.text)) < 1000
    await until(lambda: not Work.of(embedded).busy_slots, "llama.cpp works on nothing any more")


async def test_a_sample_ends_while_its_prompt_waits_or_is_read(embedded: EmbeddedEngine, embedded_target: Target) -> None:
    request = pb.GenerationRequest(text=LONG, max_tokens=1, time_limit=0.2)
    reading = asyncio.create_task(samples_by("GenerateAll", embedded_target, request))
    await until(lambda: bool(embedded._completions._prompts._prompts), "a prompt is read")
    # A prompt that is to be read alone waits until no other prompt is unread.
    waiting = pb.GenerationRequest(text="word " * 40, max_tokens=4, num_samples=2, time_limit=0.01)
    for sample in [*(await samples_by("GenerateAll", embedded_target, waiting)), *(await reading)]:
        assert (sample.finish_reason, sample.text, sample.generated_tokens) == ("time", "", 0)
    await until(lambda: not Work.of(embedded).busy_slots, "llama.cpp works on nothing any more")


async def test_a_limit_that_does_not_pass_changes_nothing(embedded_target: Target) -> None:
    request = pb.GenerationRequest(text="1, 2, 3,", max_tokens=3, temperature=0.0, time_limit=600.0)
    (sample,) = await samples_by("GenerateAll", embedded_target, request)
    assert (sample.finish_reason, sample.generated_tokens) == ("length", 3)
