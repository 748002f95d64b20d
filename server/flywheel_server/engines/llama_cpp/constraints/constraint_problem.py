"""What is wrong with a constraint, and where."""

from collections.abc import Sequence
from typing import Final

MAX_DESCRIPTION_CHARACTERS: Final = 300
"""Maximum length of a description, because it may quote long names and expressions of the caller."""


class ConstraintProblemError(ValueError):
    """A constraint that cannot be enforced.

    Attributes:
        problem: What is wrong, in words for the caller.
        pointer: The JSON pointer (RFC 6901) of the schema or keyword that is wrong; empty for the whole constraint.
        further: What else is wrong with the same constraint.
    """

    further: Sequence["ConstraintProblemError"] = ()

    def __init__(self, problem: str, pointer: str = "") -> None:
        super().__init__(problem, pointer)
        self.problem = problem
        self.pointer = pointer

    def __str__(self) -> str:
        described = f"{self.pointer}: {self.problem}" if self.pointer else self.problem
        printable = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in described)
        if len(printable) <= MAX_DESCRIPTION_CHARACTERS:
            return printable
        half = MAX_DESCRIPTION_CHARACTERS // 2
        return f"{printable[:half]} … {printable[-half:]}"


class ConstraintTooLargeError(ConstraintProblemError):
    """A constraint of which no more is read, because it has too much of something."""
