"""Parameters of tests that have more cases than `make test` has time for: it tries some, and `make test-thorough` the rest."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def further(cases: Iterable[Any], *, but: Collection[Any] = ()) -> list[Any]:
    """Returns the cases for `make test-thorough`, without those that `make test` tries.

    In their order, which must be the same in each worker: a set has another one in each process.
    """
    assert not isinstance(cases, set | frozenset)
    return [pytest.param(case, marks=pytest.mark.thorough) for case in cases if case not in but]
