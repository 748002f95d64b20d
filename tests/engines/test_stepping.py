"""Steps for all generations at once: on schedule, also after the event loop was busy. An error ends only one generation."""

import asyncio
import time

import pytest
from flywheel_server.engines.stepping import StepScheduler

from tests.serving import until

INTERVAL = 0.02


class Generation:
    """Counts its steps, until it has made all of them."""

    def __init__(self, steps: int, *, fails_after: int | None = None) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.is_paused = False
        self.steps = 0
        self.times: list[float] = []
        self._last = steps
        self._fails_after = fails_after

    def step(self) -> bool:
        if self.steps == self._fails_after:
            raise KeyError("it fails")
        self.steps += 1
        self.times.append(time.monotonic())
        if self.steps == self._last and not self.done.done():
            self.done.set_result(None)
        return self.steps < self._last


async def test_steps_come_at_their_times() -> None:
    began = time.monotonic()
    generation = Generation(5)
    await StepScheduler(INTERVAL).run(generation)
    assert all(at - began >= number * INTERVAL - 0.002 for number, at in enumerate(generation.times, start=1))


async def test_overdue_steps_are_made_at_once_after_the_event_loop_was_busy() -> None:
    generation = Generation(1000)
    making = asyncio.create_task(StepScheduler(INTERVAL).run(generation))
    await asyncio.sleep(0)
    began = time.monotonic()
    time.sleep(10 * INTERVAL)  # noqa: ASYNC251 - keeps the event loop busy
    await until(lambda: generation.steps > 0, "it steps")
    elapsed = time.monotonic() - began
    assert 10 <= generation.steps <= elapsed / INTERVAL + 1
    making.cancel()


async def test_a_new_generation_joins_the_steps_of_the_others() -> None:
    interval = 5 * INTERVAL
    steps = StepScheduler(interval)
    first, second = Generation(4), Generation(2)
    making = asyncio.create_task(steps.run(first))
    await asyncio.sleep(1.5 * interval)
    await steps.run(second)
    await making
    assert min(abs(second.times[-1] - at) for at in first.times) < interval / 4


@pytest.mark.parametrize("interval", [0.0, 0.001])
async def test_a_generation_that_fails_ends_alone(interval: float) -> None:
    steps = StepScheduler(interval)
    failing, other = Generation(10, fails_after=3), Generation(20)
    results = await asyncio.gather(steps.run(failing), steps.run(other), return_exceptions=True)
    assert isinstance(results[0], KeyError)
    assert results[1] is None
    assert (failing.steps, other.steps) == (3, 20)


@pytest.mark.parametrize("interval", [0.0, 0.001])
async def test_a_paused_generation_makes_no_steps_and_then_goes_on_at_the_same_pace(interval: float) -> None:
    steps = StepScheduler(interval)
    paused, other = Generation(30), Generation(30)
    paused.is_paused = True
    making = asyncio.create_task(steps.run(paused))
    await steps.run(other)
    assert paused.steps == 0
    await asyncio.sleep(0.01)
    paused.is_paused = False
    began = time.monotonic()
    await making
    assert time.monotonic() - began >= 28 * interval
    assert paused.steps == 30


@pytest.mark.parametrize("interval", [0.0, 0.001])
async def test_the_timer_stops_when_the_last_generation_has_ended(interval: float) -> None:
    steps = StepScheduler(interval)
    await steps.run(Generation(2))
    making = asyncio.create_task(steps.run(Generation(10**9)))
    await asyncio.sleep(0.01)
    making.cancel()
    await asyncio.gather(making, return_exceptions=True)
    assert steps._timer is None
