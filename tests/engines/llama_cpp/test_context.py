"""The context of the embedded engine: requests wait until there is room for them, and what is admitted fits."""

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import pytest
from flywheel_server.engines.base import EngineFailedError
from flywheel_server.engines.llama_cpp.default_model import default_model
from flywheel_server.engines.llama_cpp.engine import EmbeddedEngine
from flywheel_server.engines.llama_cpp.llama import Chunk
from flywheel_server.engines.samples import FinishedSamplesSink
from flywheel_server.messages import GenerationRequest

from tests.engines.llama_cpp.conftest import COUNTING, SLOTS, engine_of, samples_of
from tests.serving import until


@pytest.fixture(scope="module")
async def unserved() -> AsyncIterator[EmbeddedEngine]:
    """An engine that no supervisor checks meanwhile, which would take a place among the prompts of a test."""
    async with engine_of(default_model(), slots=SLOTS, context_tokens=4096) as engine:
        yield engine


@pytest.mark.thorough
async def test_prompt_and_max_tokens_may_fill_the_context() -> None:
    async with engine_of(default_model(), slots=2) as engine:
        request = GenerationRequest(text="word " * 512, max_input_tokens=504, max_tokens=8)
        # Twice at a time, and again where the slots still hold the last prompts.
        for _ in range(2):
            for samples in await asyncio.gather(samples_of(engine, request), samples_of(engine, request)):
                assert [(sample.prompt_tokens, sample.generated_tokens) for sample in samples] == [(504, 8)]


@pytest.mark.thorough
async def test_what_the_context_does_not_hold_at_a_time_is_done_one_after_the_other() -> None:
    async with engine_of(default_model(), slots=4, context_tokens=256) as engine:
        # Two at a time fit.
        calls = (samples_of(engine, GenerationRequest(text=f"{COUNTING} {number}", max_tokens=60)) for number in range(5))
        assert [len(samples) for samples in await asyncio.gather(*calls)] == [1] * 5
        samples = await samples_of(engine, GenerationRequest(text=COUNTING, max_tokens=60, num_samples=5))
        assert sorted(sample.index for sample in samples) == list(range(5))


@pytest.mark.thorough
@pytest.mark.parametrize("num_samples", [1, 4, 8])
async def test_what_is_admitted_fits_whatever_the_slots_have_kept(num_samples: int) -> None:
    large = GenerationRequest(text="zebra " * 120, max_tokens=8, num_samples=num_samples)
    async with engine_of(default_model(), slots=8, context_tokens=256) as engine:
        for _ in range(2):
            # All slots keep prompts that have nothing in common, and then those of the large call.
            small = [GenerationRequest(text=f"{word} 1 2 3 4 5 6 7 8 9", max_tokens=8) for word in "abcdefgh"]
            for samples in await asyncio.gather(*(samples_of(engine, request) for request in small)):
                assert len(samples) == 1
            assert len(await samples_of(engine, large)) == num_samples


async def test_a_second_cancel_does_not_free_the_room_before_llama_has_let_go(
    unserved: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, leave = threading.Event(), threading.Event()

    def slow_step(_: Any, on_chunk: Callable[[Chunk], bool]) -> None:
        entered.set()
        leave.wait(30)
        on_chunk({})

    monkeypatch.setattr(unserved._llama, "complete", slow_step)
    running = asyncio.ensure_future(samples_of(unserved, GenerationRequest(text="x", max_tokens=4000)))
    await asyncio.to_thread(entered.wait)
    for task in [running, *unserved._tasks, *unserved._tasks]:
        task.cancel()
        await asyncio.sleep(0)
    await asyncio.wait([running])
    waiting = asyncio.ensure_future(samples_of(unserved, GenerationRequest(text="x", max_tokens=4000)))
    await until(lambda: unserved._capacity.waiting == 1, "the next one waits for the room")
    leave.set()
    await until(lambda: unserved._capacity.waiting == 0, "the room is free")
    with pytest.raises(EngineFailedError):
        await waiting  # the fake finishes no sample


async def test_what_waits_of_a_call_does_not_stand_before_others(
    unserved: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_work: list[tuple[int, int]] = []
    leave = threading.Event()
    read: Chunk = {"prompt_progress": {"total": 1, "processed": 1}}

    def slow_step(body: Any, on_chunk: Callable[[Chunk], bool]) -> None:
        at_work.append((body["n"], body["max_tokens"]))
        on_chunk(read)
        leave.wait(30)
        on_chunk({})

    monkeypatch.setattr(unserved._llama, "complete", slow_step)
    # Three samples at a time fit the context, and the fourth has to wait for them; for a small call there is room.
    large = asyncio.ensure_future(samples_of(unserved, GenerationRequest(text="x", max_tokens=1100, num_samples=4)))
    await until(lambda: at_work == [(3, 1100)], "as much as fits is in work")
    small = asyncio.ensure_future(samples_of(unserved, GenerationRequest(text="x", max_tokens=2)))
    try:
        await until(lambda: at_work == [(3, 1100), (1, 2)], "so is the small one", within=10)
    finally:
        leave.set()
    for call in (large, small):
        with pytest.raises(EngineFailedError):
            await call  # the fake finishes no sample
    await until(lambda: not unserved._tasks, "the work on the calls has ended")
    assert at_work == [(3, 1100), (1, 2)], "nothing is begun for a call that has failed"


class FakeReading:
    """Stands in for `Llama.complete`: reads no prompt by itself, and tells of progress as a test says."""

    def __init__(self) -> None:
        self.given: dict[int, Callable[[Chunk], bool]] = {}
        """By the length of each prompt that was given to it, what it tells."""
        self.leave = threading.Event()

    def complete(self, body: Any, on_chunk: Callable[[Chunk], bool]) -> None:
        self.given[len(body["prompt"])] = on_chunk
        self.leave.wait(30)
        on_chunk({})

    def progress(self, prompt: int, processed: int) -> None:
        self.given[prompt]({"prompt_progress": {"total": prompt, "processed": processed}})


async def test_prompts_that_one_step_reads_are_given_to_llama_together(
    unserved: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeReading()
    monkeypatch.setattr(unserved._llama, "complete", fake.complete)
    # Tokens of the prompts. A step has room for 12, as it computes 16, of which 4 may be those of samples.
    requests = [GenerationRequest(text=" a" * tokens, max_tokens=1) for tokens in (5, 7, 30, 3)]
    calls = [
        asyncio.ensure_future(unserved.generate(await unserved.prepare(request), FinishedSamplesSink())) for request in requests
    ]
    try:
        await until(lambda: set(fake.given) == {5, 7}, "the two that fit are given")
        fake.progress(5, 5)
        fake.progress(7, 0)
        await until(lambda: set(fake.given) == {5, 7, 30}, "so is the next one: it can begin when the step has ended")
        fake.progress(7, 7)
        fake.progress(30, 17)
        await asyncio.sleep(0.05)
        assert 3 not in fake.given, "the next step has no room for the rest of the long one and more"
        fake.progress(30, 18)
        await until(lambda: 3 in fake.given, "the next step reads the rest")
    finally:
        fake.leave.set()
    for call in calls:
        with pytest.raises(EngineFailedError):
            await call  # the fake finishes no sample


@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(2))
async def test_what_is_admitted_fits_in_whatever_order_prompts_come(seed: int) -> None:
    chance = random.Random(seed)
    async with engine_of(default_model(), slots=6, context_tokens=256) as engine:

        async def one_caller() -> None:
            for _ in range(3):
                words = " ".join(
                    chance.choice(["zebra", "llama", "1", "7", "x"]) for _ in range(chance.choice([1, 3, 9, 30, 90]))
                )
                request = GenerationRequest(
                    text=words,
                    max_tokens=chance.choice([1, 2, 12]),
                    max_input_tokens=200,
                    num_samples=chance.choice([1, 1, 1, 3]),
                )
                call = asyncio.ensure_future(samples_of(engine, request))
                if chance.random() < 0.2:
                    await asyncio.sleep(chance.random() * 0.2)
                    call.cancel()
                    with suppress(asyncio.CancelledError):
                        await call
                else:
                    assert len(await call) == request.num_samples

        await asyncio.gather(*(one_caller() for _ in range(7)))
