"""Checks that work takes no more CPU time than it may, on a machine of any speed that may be busy."""

import gc
import time
from collections.abc import Callable
from typing import Final

TRIES: Final = 5
"""How often the work may be tried, because something else on the machine can slow down one try."""

YARDSTICK_SECONDS: Final = 0.01
"""CPU time of the yardstick on the machine for which limits are meant. A slower machine has more time."""


def check_cpu_time(limit: float, work: Callable[[], object]) -> None:
    """Asserts that the work can be done within so many seconds of CPU time, as a machine of usual speed has them.

    The CPU time of all threads counts, because llama.cpp has threads of its own. If a try is fast enough, there is no other.
    """
    tries = []
    for _ in range(TRIES):
        taken = _cpu_seconds(work)
        slowness = max(1.0, _cpu_seconds(_yardstick) / YARDSTICK_SECONDS) if taken > limit else 1.0
        tries.append(taken / slowness)
        if tries[-1] <= limit:
            return
    raise AssertionError(f"took {', '.join(f'{each:.3f}' for each in tries)} s of CPU time, and may take {limit} s")


def _cpu_seconds(work: Callable[[], object]) -> float:
    # A garbage collection looks at all that pytest and the tests hold, which takes longer than most work that is measured.
    gc.disable()
    try:
        begun = time.process_time()
        work()
        return time.process_time() - begun
    finally:
        gc.enable()


def _yardstick() -> None:
    numbers = {str(number): number for number in range(40_000)}
    assert sum(numbers.values()) == sum(range(40_000))
