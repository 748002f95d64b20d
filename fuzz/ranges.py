"""The ranges of the contract, written down apart from the server: fuzzing and tests compare the server with them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from flywheel_server.messages import RequestLimits

INT32_MAX: Final = 2**31 - 1
FLOAT_MAX: Final = (2 - 2**-23) * 2**127
FLOAT_MIN: Final = 2**-149
"""The highest finite float of 32 bits, and the lowest above 0."""


@dataclass(frozen=True)
class Integers:
    """Whole numbers of 32 bits, from `lowest` to `highest`."""

    lowest: int
    highest: int = INT32_MAX

    def accepts(self, value: Any) -> bool:  # noqa: ANN401 - the value of any field
        """Returns whether the value is in the range."""
        return bool(self.lowest <= value <= self.highest)

    def wrong(self) -> list[tuple[str, Any]]:
        """Returns values out of the range, each with the end of its path in a violation: such as `[1]`, or nothing."""
        return [("", value) for value in (self.lowest - 1, self.highest + 1) if value <= INT32_MAX]


@dataclass(frozen=True)
class Floats:
    """Finite numbers of 32 bits, from `lowest` to `highest`."""

    lowest: float
    highest: float = FLOAT_MAX

    def accepts(self, value: Any) -> bool:  # noqa: ANN401 - the value of any field
        """Returns whether the value is in the range."""
        return bool(self.lowest <= value <= self.highest)

    def wrong(self) -> list[tuple[str, Any]]:
        """Returns values out of the range; see `Integers.wrong`."""
        values = (0.0, self.lowest - 0.1, self.highest + 0.01, math.nan, math.inf, -math.inf)
        return [("", value) for value in values if not self.accepts(value)]


@dataclass(frozen=True)
class Texts:
    """Texts of 1 to `max_bytes` bytes in UTF-8."""

    max_bytes: int

    @property
    def lowest(self) -> str:
        """One of the shortest texts."""
        return "x"

    @property
    def highest(self) -> str:
        """One of the longest texts."""
        return "é" * (self.max_bytes // 2)

    def accepts(self, value: Any) -> bool:  # noqa: ANN401 - the value of any field
        """Returns whether the value is in the range."""
        return 1 <= len(value.encode()) <= self.max_bytes

    def wrong(self) -> list[tuple[str, Any]]:
        """Returns values out of the range; see `Integers.wrong`."""
        return [("", ""), ("", "é" * (self.max_bytes // 2 + 1))]


@dataclass(frozen=True)
class Repeated:
    """At most `max_elements` elements, each of them in its range."""

    element: Integers | Texts
    max_elements: int

    @property
    def lowest(self) -> Sequence[Any]:
        """One element, the lowest."""
        return [self.element.lowest]

    @property
    def highest(self) -> Sequence[Any]:
        """The most elements, each the highest."""
        return [self.element.highest] * self.max_elements

    def accepts(self, value: Any) -> bool:  # noqa: ANN401 - the value of any field
        """Returns whether the values are in the range."""
        return len(value) <= self.max_elements and all(map(self.element.accepts, value))

    def wrong(self) -> list[tuple[str, Any]]:
        """Returns values out of the range; see `Integers.wrong`."""
        elements = [("[1]", [self.element.lowest, wrong]) for _, wrong in self.element.wrong()]
        return [*elements, ("", [self.element.lowest] * (self.max_elements + 1))]


Range = Integers | Floats | Texts | Repeated


def ranges(limits: RequestLimits) -> Mapping[str, Range]:
    """Returns the range of each field of a request, in a deployment with these limits."""
    return {
        "text": Texts(limits.max_text_bytes),
        "max_tokens": Integers(1, limits.context_tokens),
        "eos_token_ids": Repeated(Integers(0), max_elements=64),
        "max_input_tokens": Integers(0),
        "num_samples": Integers(1, limits.max_num_samples),
        "stop": Repeated(Texts(256), max_elements=16),
        "temperature": Floats(0),
        "top_k": Integers(0),
        "top_p": Floats(FLOAT_MIN, 1),
        "presence_penalty": Floats(-2, 2),
        "frequency_penalty": Floats(-2, 2),
    }


def lowest(fields: Mapping[str, Range]) -> dict[str, Any]:
    """Returns the lowest value of each field."""
    return {name: its.lowest for name, its in fields.items()}


def highest(fields: Mapping[str, Range]) -> dict[str, Any]:
    """Returns the highest value of each field."""
    return {name: its.highest for name, its in fields.items()}
