"""Steps for all generations of an engine at once, as an engine with continuous batching makes them."""

import asyncio
import math
from typing import Final, Protocol

TIMER_TOLERANCE: Final = 0.0005
"""Seconds by which a timer of the event loop may fire too early: uvloop rounds to milliseconds."""

PAUSED_INTERVAL: Final = 0.001
"""Seconds between two looks at generations that are all paused, if steps have no interval of their own."""


ITERATIONS_PER_STEP: Final = 3
"""In how many iterations of the event loop there is one step, if there is no interval: the others are left to the calls."""


class Stepped(Protocol):
    """A generation that steps make."""

    done: asyncio.Future[None]
    """Done when the generation has ended."""

    @property
    def is_paused(self) -> bool:
        """Whether it takes no part in a step now."""

    def step(self) -> bool:
        """Makes a step, and returns whether there may be further ones; raises what ends the generation."""


class Steps:
    """Makes a step for all generations every `interval` seconds, or with 0 in every third iteration of the event loop.

    The steps keep to their schedule: what an event loop that was busy is late for, it makes up for at once. A generation takes
    part from the next step on. No time is kept while there is none.
    """

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._generations: dict[Stepped, int] = {}
        """How many steps had been made when each generation last took part in one."""
        self._began = 0.0
        self._timer: asyncio.Handle | None = None

    async def make(self, generation: Stepped) -> None:
        """Makes steps for the generation until it is done; raises what ended it. Cancelling takes the generation out."""
        loop = asyncio.get_running_loop()
        if not self._generations:
            self._began = loop.time()
        self._generations[generation] = math.ceil(self._steps_until(loop.time() - TIMER_TOLERANCE))
        if self._timer is None:
            self._arm(loop)
        try:
            await generation.done
        finally:
            self._take_out(generation)

    def _take_out(self, generation: Stepped) -> None:
        self._generations.pop(generation, None)
        if not self._generations and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _steps_until(self, now: float) -> float:
        return (now - self._began) / self._interval if self._interval else 0.0

    def _arm(self, loop: asyncio.AbstractEventLoop, *, all_paused: bool = False) -> None:
        if self._interval:
            next_step = int(self._steps_until(loop.time() + TIMER_TOLERANCE)) + 1
            self._timer = loop.call_at(self._began + next_step * self._interval, self._step, loop)
        elif all_paused:
            self._timer = loop.call_later(PAUSED_INTERVAL, self._step, loop)
        else:
            self._timer = loop.call_soon(self._pass, loop, ITERATIONS_PER_STEP - 1)

    def _pass(self, loop: asyncio.AbstractEventLoop, iterations: int) -> None:
        """Lets so many iterations pass before a step."""
        if iterations:
            self._timer = loop.call_soon(self._pass, loop, iterations - 1)
        else:
            self._step(loop)

    def _step(self, loop: asyncio.AbstractEventLoop) -> None:
        made = int(self._steps_until(loop.time() + TIMER_TOLERANCE))
        all_paused = True
        for generation, before in list(self._generations.items()):
            if generation.is_paused:
                self._generations[generation] = made
                continue
            all_paused = False
            due = made - before if self._interval else 1
            if due > 0:
                self._generations[generation] = made
                self._make(generation, due)
        if self._generations:
            self._arm(loop, all_paused=all_paused)
        else:
            self._timer = None

    def _make(self, generation: Stepped, steps: int) -> None:
        try:
            while generation.step():
                steps -= 1
                if not steps or generation.is_paused:
                    return
            del self._generations[generation]
        except Exception as error:  # noqa: BLE001 - it ends this generation, and no other
            del self._generations[generation]
            if not generation.done.done():
                generation.done.set_exception(error)
