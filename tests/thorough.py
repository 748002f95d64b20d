"""Parameters of tests that have more cases than `make test` has time for: it tries some, and `make test-thorough` the rest."""

from collections.abc import Collection, Iterable, Sequence
from itertools import product
from typing import Any

import pytest


def further(cases: Iterable[Any], *, but: Collection[Any] = ()) -> list[Any]:
    """Returns the cases for `make test-thorough`, without those that `make test` tries.

    In their order, which must be the same in each worker: a set has another one in each process.
    """
    assert not isinstance(cases, set | frozenset)
    return [pytest.param(case, marks=pytest.mark.thorough) for case in cases if case not in but]


def each_once(*parameters: Sequence[Any]) -> list[Any]:
    """Returns all combinations of values of several parameters. `make test` tries so many of them that each value is in one."""
    count = max(map(len, parameters))
    tried = [tuple(values[number % len(values)] for values in parameters) for number in range(count)]
    return [*tried, *(pytest.param(*each, marks=pytest.mark.thorough) for each in product(*parameters) if each not in tried)]
