"""Capacity is given out first come, first served, and never lost."""

import asyncio
import random

from flywheel_server.engines.capacity import Capacity

from tests.serving import until


async def test_a_small_request_never_overtakes_a_large_one() -> None:
    capacity = Capacity(slots=2, tokens=100)
    order: list[str] = []
    release = asyncio.Event()

    async def hold(name: str, slots: int, tokens: int) -> None:
        async with capacity.reserve(slots, tokens):
            order.append(name)
            await release.wait()

    first = asyncio.create_task(hold("first", 1, 90))
    await until(lambda: order == ["first"], "the first one runs")
    large = asyncio.create_task(hold("large", 2, 100))
    small = asyncio.create_task(hold("small", 1, 1))
    await until(lambda: capacity.waiting == 2, "both wait")
    assert order == ["first"]
    release.set()
    await asyncio.gather(first, large, small)
    assert order == ["first", "large", "small"]


async def test_a_cancelled_request_leaves_the_queue_to_the_next_one() -> None:
    capacity = Capacity(slots=1, tokens=10)
    async with capacity.reserve(1, 1):
        waiting = asyncio.create_task(capacity.reserve(1, 1).__aenter__())
        behind = asyncio.create_task(capacity.reserve(1, 1).__aenter__())
        await until(lambda: capacity.waiting == 2, "both wait")
        waiting.cancel()
        await until(lambda: capacity.waiting == 1, "one has left")
    await behind
    assert capacity.waiting == 0


async def test_random_cancels_leave_nothing_behind() -> None:
    capacity = Capacity(slots=4, tokens=40)
    rng = random.Random(7)
    held = 0
    peak = 0

    async def hold() -> None:
        nonlocal held, peak
        slots = rng.randint(1, 4)
        async with capacity.reserve(slots, slots * 10):
            held += slots
            peak = max(peak, held)
            try:
                await asyncio.sleep(rng.random() / 500)
            finally:
                held -= slots

    tasks = [asyncio.create_task(hold()) for _ in range(300)]
    for task in rng.sample(tasks, 150):
        await asyncio.sleep(0)
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert (held, capacity.waiting) == (0, 0)
    assert peak <= 4
    async with asyncio.timeout(10), capacity.reserve(4, 40):
        pass
