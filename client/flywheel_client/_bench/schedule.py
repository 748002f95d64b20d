"""Says when the calls of an open loop are sent: at a constant rate, or at random times as many independent users do."""

import random
from collections.abc import Iterator
from itertools import count
from typing import Final, Literal

Arrivals = Literal["poisson", "constant"]

_SEED: Final = 1
"""Makes the random times of all runs equal, so that two runs with the same options compare the same load."""


def arrival_times(rate: float, arrivals: Arrivals) -> Iterator[float]:
    """Yields the times, in seconds from the beginning of the run, at which calls are sent, without end.

    Args:
        rate: The calls per second, on average.
        arrivals: "poisson": the times between two calls are random, with an exponential distribution. "constant": these
            times are equal.
    """
    if arrivals == "constant":
        yield from (number / rate for number in count())
        return
    intervals = random.Random(_SEED)  # noqa: S311 - this is not a secret
    time = 0.0
    while True:
        time += intervals.expovariate(rate)
        yield time
