"""Requests with the same seed have the same samples, whatever else the engine works on."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.engines.llama_cpp.default_model import default_model
from flywheel_server.engines.llama_cpp.engine import EmbeddedEngine
from flywheel_server.engines.seeds import SEEDS

from tests.engines.llama_cpp.conftest import Work
from tests.serving import Target, serving, until
from tests.thorough import further

WORDS = ["llama", "desert", "story", "music", "code", "river", "12", "once", "upon", "a", "time", "🦙", "é"]


def random_text(chance: random.Random) -> str:
    return " ".join(chance.choices(WORDS, k=chance.randint(1, 6)))


def random_request(chance: random.Random) -> pb.GenerationRequest:
    return pb.GenerationRequest(
        text=random_text(chance),
        max_tokens=chance.randint(2, 6),
        num_samples=chance.choice([1, 1, 1, 1, 2]),
        seed=chance.choice([chance.randrange(SEEDS), 0, SEEDS - 1]),
        temperature=chance.choice([0.7, 1.0, 1.5]),
        top_k=chance.choice([0, 50]),
        top_p=chance.choice([0.9, 1.0]),
        min_p=chance.choice([0.0, 0.05]),
        stop=chance.choice([[], ["the"]]),
    )


@asynccontextmanager
async def load(target: Target, chance: random.Random) -> AsyncIterator[None]:
    """Makes calls without seeds, two at a time."""

    async def call() -> None:
        while True:
            request = pb.GenerationRequest(text=random_text(chance), max_tokens=4, num_samples=chance.randint(1, 3))
            await target.stub.GenerateAll(request)

    calling = [asyncio.create_task(call()) for _ in range(2)]
    try:
        yield
    finally:
        for task in calling:
            task.cancel()
        await asyncio.gather(*calling, return_exceptions=True)


async def texts_by(method: str, target: Target, request: pb.GenerationRequest) -> dict[int, tuple[str, int]]:
    """Returns the text and the seed of each sample, by index."""
    if method == "GenerateAll":
        samples = (await target.stub.GenerateAll(request)).responses
    elif method == "Generate":
        samples = [sample async for sample in target.stub.Generate(request)]
    else:
        texts: dict[int, tuple[str, int]] = {}
        async for delta in target.stub.GenerateDeltas(request):
            texts[delta.index] = (texts.get(delta.index, ("", 0))[0] + delta.text, delta.seed)
        return texts
    return {sample.index: (sample.text, sample.seed) for sample in samples}


@pytest.mark.parametrize("series", [0, *further(range(1, 20))])
async def test_repeated_requests_have_equal_samples(embedded_target: Target, series: int) -> None:
    chance = random.Random(series)
    requests = [random_request(chance) for _ in range(10)]
    methods = ["GenerateAll", "Generate", "GenerateDeltas"]
    order = [*range(len(requests))]

    async def repeat(number: int) -> dict[int, tuple[str, int]]:
        return await texts_by(methods[number % 3], embedded_target, requests[number])

    async with load(embedded_target, chance):
        first = await asyncio.gather(*map(repeat, order))
    methods.reverse()
    chance.shuffle(order)
    for number in order:
        assert await repeat(number) == first[number], requests[number]


async def test_a_further_sample_is_the_sample_of_a_request_with_its_seed(embedded_target: Target) -> None:
    request = pb.GenerationRequest(text="Once upon a time", max_tokens=5, num_samples=3, seed=SEEDS - 2)
    samples = await texts_by("GenerateAll", embedded_target, request)
    assert [seed for _, seed in samples.values()] == [SEEDS - 2, SEEDS - 1, 0]
    assert len({text for text, _ in samples.values()}) == 3
    for text, seed in samples.values():
        single = pb.GenerationRequest(text="Once upon a time", max_tokens=5, seed=seed)
        assert await texts_by("Generate", embedded_target, single) == {0: (text, seed)}


@pytest.mark.parametrize("num_samples", [2, *further([1, 4])])
async def test_a_drawn_seed_comes_back_and_repeats_the_sample(embedded_target: Target, num_samples: int) -> None:
    # With a temperature this low, no two tokens are nearly equally likely.
    request = pb.GenerationRequest(text="1, 2, 3, 4, 5, 6,", max_tokens=5, num_samples=num_samples, temperature=0.1)
    drawn = await texts_by("GenerateDeltas", embedded_target, request)
    seeds = [drawn[index][1] for index in range(num_samples)]
    assert seeds == [*range(seeds[0], seeds[0] + num_samples)]
    request.seed = seeds[0]
    assert await texts_by("GenerateAll", embedded_target, request) == drawn
    request.ClearField("seed")
    assert (await texts_by("GenerateAll", embedded_target, request))[0][1] != seeds[0]


async def test_a_request_with_a_seed_is_alone_in_the_engine(embedded: EmbeddedEngine, embedded_target: Target) -> None:
    assert (await embedded_target.stub.GetModel(pb.GetModelRequest())).exact_seeds
    endless = pb.GenerationRequest(text="1, 2, 3,", max_tokens=1000, temperature=0.0)
    other = embedded_target.stub.GenerateAll(endless)
    await until(lambda: Work.of(embedded).busy_slots == 1, "a call runs")
    endless.seed = 7
    endless.num_samples = 2
    seeded = embedded_target.stub.GenerateAll(endless)
    queued = embedded_target.stub.GenerateAll(pb.GenerationRequest(text="Hi", max_tokens=1))
    await until(lambda: _queued(embedded_target, 2), "both wait, although there are free slots")
    other.cancel()
    await until(lambda: _queued(embedded_target, 1), "the call with the seed runs")
    await until(lambda: Work.of(embedded).busy_slots == 1, "its first sample runs")
    assert await _queued(embedded_target, 1), "there are free slots, but the other call waits"
    seeded.cancel()
    await queued
    for call in (other, seeded):
        with suppress(asyncio.CancelledError):
            await call


async def _queued(target: Target, count: int) -> bool:
    stats: pb.Stats = await target.stub.GetStats(pb.GetStatsRequest())
    return stats.queued == count


@pytest.fixture(scope="session")
async def inexact() -> AsyncIterator[Target]:
    engine = EmbeddedEngine(
        default_model(), context_tokens=512, slots=2, threads=1, batch_tokens=16, prompt_format="raw", exact_seeds=False
    )
    async with serving(engine) as target:
        yield target


async def test_without_exact_seeds_samples_share_the_engine(inexact: Target) -> None:
    assert not (await inexact.stub.GetModel(pb.GetModelRequest())).exact_seeds
    for seed in (5, SEEDS - 1):
        request = pb.GenerationRequest(text="1, 2, 3, 4, 5, 6,", max_tokens=4, num_samples=2, seed=seed, temperature=0.1)
        samples = await texts_by("GenerateAll", inexact, request)
        assert [seed for _, seed in samples.values()] == [seed, (seed + 1) % SEEDS]
        request.seed, request.num_samples = samples[1][1], 1
        assert await texts_by("GenerateAll", inexact, request) == {0: samples[1]}
