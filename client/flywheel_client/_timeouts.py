"""Checks the timeouts and delays that callers pass, alike for all arguments of the client."""

from math import inf, nan
from typing import Final, SupportsFloat, SupportsIndex

MAX_DEADLINE_SECONDS: Final = 27_000 * 3600.0
"""The longest deadline that gRPC sends: 27,000 hours, about three years. gRPC shortens longer deadlines to this. A deadline
after the year 2262, when 64 bits of nanoseconds overflow, passes at once (grpcio 1.73 to 1.85)."""


def checked_timeout(timeout: object) -> float | None:
    """Returns the timeout of a call in seconds; None (no deadline) for None and for more than `MAX_DEADLINE_SECONDS`.

    Raises:
        TypeError: The timeout is not a number.
        ValueError: The timeout is negative or NaN.
    """
    if timeout is None:
        return None
    seconds = seconds_of("timeout", timeout)
    if not seconds >= 0:
        raise ValueError(f"timeout must be 0 seconds or more, not {timeout!r}")
    return seconds if seconds <= MAX_DEADLINE_SECONDS else None


def seconds_of(name: str, value: object) -> float:
    """Returns a number of any type as a float, which may be infinite or NaN; raises `TypeError` for any other value."""
    if isinstance(value, bool) or not isinstance(value, SupportsFloat | SupportsIndex):
        raise TypeError(f"{name} must be a number of seconds, not {value!r}")
    try:
        return float(value)
    except OverflowError:  # an integer beyond the range of floats
        return inf if value > 0 else -inf  # type: ignore[operator]
    except ValueError:  # Decimal("sNaN")
        return nan
