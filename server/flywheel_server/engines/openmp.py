"""How the threads of llama.cpp wait for one another, some hundred times for each token: at the barriers of OpenMP.

By default, a thread of GNU's OpenMP (libgomp) spins for milliseconds before it sleeps. If other programs want the cores, the
thread that it waits for may not be running, and spinning takes the very time that this one needs: beside two busy programs on
two cores, two threads may take seconds for a token. A thread that sleeps at once has to be woken at each barrier, which costs
half of the speed of a quiet machine.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

SPINS: Final = 1000
"""How often a thread looks before it sleeps: for 5 to 50 µs, about as long as it takes to wake it. `python -m benchmarks.busy`
compares numbers."""

CHOSEN_BY_USER: Final = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
"""Variables that say how long threads look. If one is set, it holds."""


@contextmanager
def short_spins() -> Iterator[None]:
    """Has an OpenMP library that is loaded meanwhile let threads sleep soon, unless the environment says how they wait.

    The library reads the environment once, when it is loaded. Child processes do not inherit the variable.
    """
    if any(os.environ.get(name) for name in CHOSEN_BY_USER):
        yield
        return
    before = os.environ.get("GOMP_SPINCOUNT")
    os.environ["GOMP_SPINCOUNT"] = str(SPINS)
    try:
        yield
    finally:
        if before is None:
            del os.environ["GOMP_SPINCOUNT"]
        else:
            os.environ["GOMP_SPINCOUNT"] = before
