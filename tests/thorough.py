"""Parameters of tests that have more cases than `make test` has time for: it tries some, and `make test-thorough` the rest."""

from collections.abc import Iterable
from typing import Any

import pytest


def further(cases: Iterable[Any]) -> list[Any]:
    """Returns the cases for `make test-thorough`."""
    return [pytest.param(case, marks=pytest.mark.thorough) for case in cases]
