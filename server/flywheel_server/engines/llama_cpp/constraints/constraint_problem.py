"""What is wrong with a constraint, and where."""


class ConstraintProblemError(ValueError):
    """A constraint that cannot be enforced.

    Attributes:
        problem: What is wrong, in words for the caller.
        pointer: The JSON pointer (RFC 6901) of the schema or keyword that is wrong; empty for the whole constraint.
    """

    def __init__(self, problem: str, pointer: str = "") -> None:
        super().__init__(problem, pointer)
        self.problem = problem
        self.pointer = pointer

    def __str__(self) -> str:
        return f"{self.pointer}: {self.problem}" if self.pointer else self.problem
