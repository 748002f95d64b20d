"""Makes one step for all generations of an engine at once, as an engine with continuous batching does."""

import asyncio
import math
from typing import Final, Protocol

TIMER_TOLERANCE: Final = 0.0005
"""Seconds by which a timer of the event loop may fire too early: uvloop rounds times to milliseconds."""

PAUSED_POLL_INTERVAL: Final = 0.001
"""Seconds between two polls if all generations are paused and the steps have no interval of their own."""

ITERATIONS_PER_STEP: Final = 3
"""Iterations of the event loop for each step if there is no interval. The other iterations serve the calls."""


class SteppedGeneration(Protocol):
    """A generation that is made step by step."""

    done: asyncio.Future[None]
    """Has a result when the generation has ended."""

    @property
    def is_paused(self) -> bool:
        """Whether steps leave the generation out, for now."""

    def step(self) -> bool:
        """Makes a step, and returns whether further steps may follow. An error ends the generation."""


class StepScheduler:
    """Makes a step for all generations every `interval` seconds; if that is 0, in every third iteration of the event loop.

    If the event loop was busy and steps are overdue, they are made at once. A new generation joins with the next step. The
    timer runs only while there are generations.
    """

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._generations: dict[SteppedGeneration, int] = {}
        """The number of the last step that each generation has made or, while it was paused, has skipped."""
        self._started_at = 0.0
        self._timer: asyncio.Handle | None = None

    async def run(self, generation: SteppedGeneration) -> None:
        """Makes steps for the generation until it is done; raises the error that ended it.

        If the waiting task is cancelled, no further steps are made.
        """
        loop = asyncio.get_running_loop()
        if not self._generations:
            self._started_at = loop.time()
        self._generations[generation] = math.ceil(self._steps_due(loop.time() - TIMER_TOLERANCE))
        if self._timer is None:
            self._set_timer(loop)
        try:
            await generation.done
        finally:
            self._generations.pop(generation, None)
            if not self._generations and self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def _steps_due(self, now: float) -> float:
        """Returns how many steps the schedule has until that time of the event loop's clock; a fraction is part of a step."""
        return (now - self._started_at) / self._interval if self._interval else 0.0

    def _set_timer(self, loop: asyncio.AbstractEventLoop, *, all_paused: bool = False) -> None:
        if self._interval:
            next_step = int(self._steps_due(loop.time() + TIMER_TOLERANCE)) + 1
            self._timer = loop.call_at(self._started_at + next_step * self._interval, self._step, loop)
        elif all_paused:
            self._timer = loop.call_later(PAUSED_POLL_INTERVAL, self._step, loop)
        else:
            self._timer = loop.call_soon(self._step_after, ITERATIONS_PER_STEP - 1, loop)

    def _step_after(self, iterations: int, loop: asyncio.AbstractEventLoop) -> None:
        """Makes a step after that many iterations of the event loop."""
        if iterations:
            self._timer = loop.call_soon(self._step_after, iterations - 1, loop)
        else:
            self._step(loop)

    def _step(self, loop: asyncio.AbstractEventLoop) -> None:
        scheduled = int(self._steps_due(loop.time() + TIMER_TOLERANCE))
        all_paused = True
        for generation, last_step in list(self._generations.items()):
            if generation.is_paused:
                self._generations[generation] = scheduled
                continue
            all_paused = False
            due = scheduled - last_step if self._interval else 1
            if due > 0:
                self._generations[generation] = scheduled
                self._make_steps(generation, due)
        if self._generations:
            self._set_timer(loop, all_paused=all_paused)
        else:
            self._timer = None

    def _make_steps(self, generation: SteppedGeneration, steps: int) -> None:
        try:
            while generation.step():
                steps -= 1
                if not steps or generation.is_paused:
                    return
        except Exception as error:  # noqa: BLE001 - an error ends its own generation and no other
            if not generation.done.done():
                generation.done.set_exception(error)
        del self._generations[generation]
