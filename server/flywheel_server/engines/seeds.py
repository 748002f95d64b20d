"""Seeds: each sample of a request has a seed of its own, which follows from the seed of the first sample."""

import secrets
from typing import Final

from flywheel_server.messages import GenerationRequest

SEEDS: Final = 2**31
"""How many seeds there are: 0 to 2147483647. After the last seed follows the first."""


def first_seed(request: GenerationRequest) -> int:
    """Returns the seed of the first sample: the seed of the request, or a drawn one if the request sets none.

    A drawn seed is low enough that the seeds of all samples follow each other, without a step from the last seed to the first.
    """
    return secrets.randbelow(SEEDS - request.num_samples) if request.seed is None else request.seed


def seed_of_sample(first: int, index: int) -> int:
    """Returns the seed of the sample with this index, if `first` is the seed of the first sample."""
    return (first + index) % SEEDS
