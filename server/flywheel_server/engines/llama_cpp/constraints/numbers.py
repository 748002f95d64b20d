"""Checks the numbers of a JSON Schema."""

import math
from decimal import Decimal
from fractions import Fraction
from typing import Any, Final

from flywheel_server.engines.llama_cpp.constraints.constraint_problem import ConstraintProblemError

MAX_NUMBER: Final = 2**53
"""Largest absolute value of a number in a schema. LLGuidance rounds larger ones."""

MAX_DECIMALS: Final = 15
"""Digits after the point that a number in a schema may have. LLGuidance writes more of them as an exponent, or rounds."""

BOUNDS: Final = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")


def is_number(value: Any) -> bool:  # noqa: ANN401 - JSON
    """Returns whether a value of JSON is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_number(value: Any, pointer: str) -> None:  # noqa: ANN401 - JSON
    """Raises `ConstraintProblemError` if the value is not a number that is enforced exactly."""
    if not is_number(value):
        raise ConstraintProblemError("is not a number", pointer)
    if abs(value) > MAX_NUMBER:
        raise ConstraintProblemError("is not between -2^53 and 2^53", pointer)
    if -int(Decimal(str(value)).as_tuple().exponent) > MAX_DECIMALS:
        raise ConstraintProblemError(f"has more than {MAX_DECIMALS} digits after the point", pointer)


def check_multiple(value: Any, pointer: str) -> int:  # noqa: ANN401 - JSON
    """Returns the number that the digits of a value of `multipleOf` make up, without the point.

    Raises `ConstraintProblemError` if the value cannot be one of `multipleOf`.
    """
    check_number(value, pointer)
    if value <= 0:
        raise ConstraintProblemError("is not above 0", pointer)
    exact = Decimal(str(value)).normalize()
    return int(exact.scaleb(max(0, -int(exact.as_tuple().exponent))))


def check_range(schema: dict[str, Any], pointer: str, *, integer: bool) -> None:
    """Raises `ConstraintProblemError` if no number, or no integer, is within the bounds of the schema."""
    lows = [(Fraction(str(schema[name])), name.startswith("exclusive")) for name in BOUNDS[:2] if name in schema]
    highs = [(Fraction(str(schema[name])), not name.startswith("exclusive")) for name in BOUNDS[2:] if name in schema]
    if not lows or not highs:
        return
    (low, is_above), (high, is_inclusive) = max(lows), min(highs)
    possible = low < high or (low == high and is_inclusive and not is_above)
    step = Fraction(str(schema["multipleOf"])) if "multipleOf" in schema else None
    if integer:
        # The least integer that is a multiple of a fraction is its numerator.
        step = Fraction(step.numerator if step else 1)
    if step:
        first = math.floor(low / step) + 1 if is_above else math.ceil(low / step)
        last = math.floor(high / step) if is_inclusive else math.ceil(high / step) - 1
        possible = first <= last
    if not possible:
        raise ConstraintProblemError("has bounds between which no number is allowed", pointer)
