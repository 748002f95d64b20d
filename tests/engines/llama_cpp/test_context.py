"""The context of the embedded engine: requests wait until there is room for them, and admitted requests fit."""

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
    """An engine without a supervisor, whose checks would be prompts beside the prompts of a test."""
    async with engine_of(default_model(), slots=SLOTS, context_tokens=4096) as engine:
        yield engine


@pytest.mark.thorough
async def test_prompt_and_max_tokens_may_fill_the_context() -> None:
    async with engine_of(default_model(), slots=2) as engine:
        request = GenerationRequest(text="word " * 512, max_input_tokens=504, max_tokens=8)
        # Two requests at a time, and two more while the slots still hold the last prompts.
        for _ in range(2):
            for samples in await asyncio.gather(samples_of(engine, request), samples_of(engine, request)):
                assert [(sample.prompt_tokens, sample.generated_tokens) for sample in samples] == [(504, 8)]


@pytest.mark.thorough
async def test_requests_that_do_not_fit_the_context_together_run_one_after_the_other() -> None:
    async with engine_of(default_model(), slots=4, context_tokens=256) as engine:
        # Two requests fit at a time.
        calls = (samples_of(engine, GenerationRequest(text=f"{COUNTING} {number}", max_tokens=60)) for number in range(5))
        assert [len(samples) for samples in await asyncio.gather(*calls)] == [1] * 5
        samples = await samples_of(engine, GenerationRequest(text=COUNTING, max_tokens=60, num_samples=5))
        assert sorted(sample.index for sample in samples) == list(range(5))


@pytest.mark.thorough
@pytest.mark.parametrize("num_samples", [1, 4, 8])
async def test_admitted_requests_fit_whatever_the_slots_have_kept(num_samples: int) -> None:
    large = GenerationRequest(text="zebra " * 120, max_tokens=8, num_samples=num_samples)
    async with engine_of(default_model(), slots=8, context_tokens=256) as engine:
        for _ in range(2):
            # Before the large call, the slots keep small prompts that have nothing in common; after it, they keep its prompt.
            small = [GenerationRequest(text=f"{word} 1 2 3 4 5 6 7 8 9", max_tokens=8) for word in "abcdefgh"]
            for samples in await asyncio.gather(*(samples_of(engine, request) for request in small)):
                assert len(samples) == 1
            assert len(await samples_of(engine, large)) == num_samples


async def test_a_second_cancel_does_not_free_the_context_before_llama_has_released_it(
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
    for task in [running, *unserved._completions._tasks, *unserved._completions._tasks]:
        task.cancel()
        await asyncio.sleep(0)
    await asyncio.wait([running])
    waiting = asyncio.ensure_future(samples_of(unserved, GenerationRequest(text="x", max_tokens=4000)))
    await until(lambda: unserved._completions._capacity.waiting == 1, "the next request waits for the context")
    leave.set()
    await until(lambda: unserved._completions._capacity.waiting == 0, "the context is free")
    with pytest.raises(EngineFailedError):
        await waiting  # the fake finishes no sample


async def test_waiting_samples_of_a_large_call_do_not_block_other_calls(
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
    # Three samples fit the context at a time, and the fourth has to wait for them. There is room for a small call.
    large = asyncio.ensure_future(samples_of(unserved, GenerationRequest(text="x", max_tokens=1100, num_samples=4)))
    await until(lambda: at_work == [(3, 1100)], "as many samples as fit are in work")
    small = asyncio.ensure_future(samples_of(unserved, GenerationRequest(text="x", max_tokens=2)))
    try:
        await until(lambda: at_work == [(3, 1100), (1, 2)], "the small call is in work too", within=10)
    finally:
        leave.set()
    for call in (large, small):
        with pytest.raises(EngineFailedError):
            await call  # the fake finishes no sample
    await until(lambda: not unserved._completions._tasks, "the work on the calls has ended")
    assert at_work == [(3, 1100), (1, 2)], "no completion begins for a call that has failed"


class FakeReading:
    """Stands in for `Llama.complete`: reads no prompt, and reports the progress that a test chooses."""

    def __init__(self) -> None:
        self.given: dict[int, Callable[[Chunk], bool]] = {}
        """The callback of each prompt, by the prompt's length in tokens."""
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
    # A step computes 16 tokens, of which 4 may belong to samples, so it reads at most 12 tokens of these prompts.
    requests = [GenerationRequest(text=" a" * tokens, max_tokens=1) for tokens in (5, 7, 30, 3)]
    calls = [
        asyncio.ensure_future(unserved.generate(await unserved.prepare(request), FinishedSamplesSink())) for request in requests
    ]
    try:
        await until(lambda: set(fake.given) == {5, 7}, "llama.cpp has the two prompts that fit")
        fake.progress(5, 5)
        fake.progress(7, 0)
        await until(lambda: set(fake.given) == {5, 7, 30}, "it has the next prompt, which can begin when the step has ended")
        fake.progress(7, 7)
        fake.progress(30, 17)
        await asyncio.sleep(0.05)
        assert 3 not in fake.given, "the next step has no room for more than the rest of the long prompt"
        fake.progress(30, 18)
        await until(lambda: 3 in fake.given, "the next step has room for the rest and the last prompt")
    finally:
        fake.leave.set()
    for call in calls:
        with pytest.raises(EngineFailedError):
            await call  # the fake finishes no sample


@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(2))
async def test_admitted_requests_fit_in_whatever_order_they_come(seed: int) -> None:
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
