"""Checks the cost of a regular expression, and quotes it for a grammar."""

import re
from collections.abc import Sequence
from typing import Final, NamedTuple

from flywheel_server.engines.llama_cpp.constraints.classes import MAX_CLASS_WORK, TOO_MANY_CLASSES, class_work
from flywheel_server.engines.llama_cpp.constraints.constraint_problem import ConstraintProblemError
from flywheel_server.engines.llama_cpp.constraints.regex_tokens import Token, has_flag, tokens_of

MAX_REGEX_STEPS: Final = 2_000
"""Maximum number of characters that a regular expression describes, with each counted repetition written out."""

MAX_TOKENS: Final = 10_000
"""Maximum number of characters, classes, brackets, parentheses and quantifiers in a regular expression."""

MAX_OPTIONAL_PARTS: Final = 200
"""Maximum number of parts that a regular expression may leave out, as often as they are written: those before `?`, `*` or `{0`.

Before it begins, LLGuidance works out what may follow each of them. That takes more than 50 ms for 1,000 in a row.
"""

MAX_DIGITS: Final = 9
"""Digits of a count that are looked at. A count with more is too large anyway."""


class Size(NamedTuple):
    """The size of a regular expression.

    Attributes:
        steps: About how many characters the expression describes, with each counted repetition written out.
        class_work: About how many microseconds its classes of characters take to read.
    """

    steps: int
    class_work: int


def lark_regex(regex: str) -> str:
    """Returns the regular expression as LLGuidance's Lark syntax writes it, between slashes.

    Raises `ConstraintProblemError` if the expression is too large.
    """
    check_size(regex)
    escapes = {"/": r"\/", "\n": r"\n", "\r": r"\r", "\t": r"\t"}
    # A backslash before a slash or a line break belongs to it, and is not doubled.
    escaped = re.sub(r"\\?([/\n\r\t])|\\.", lambda match: escapes.get(match[1], match[0]), regex, flags=re.DOTALL)
    return f"/{escaped}/"


def check_size(regex: str) -> Size:
    """Returns the size of the expression.

    Raises `ConstraintProblemError` if the expression is too large, or if its syntax does not let the size be counted.
    """
    tokens = tokens_of(regex)
    if len(tokens) > MAX_TOKENS:
        raise ConstraintProblemError(f"has more than {MAX_TOKENS} characters, classes and signs")
    if has_flag("x", tokens):
        raise ConstraintProblemError("has the flag x, which is not supported")
    size = Size(_expanded_size(tokens), class_work(tokens))
    if size.steps > MAX_REGEX_STEPS:
        raise ConstraintProblemError(f"has more than {MAX_REGEX_STEPS} characters when its counted repetitions are written out")
    if sum(map(_is_optional, tokens)) > MAX_OPTIONAL_PARTS:
        raise ConstraintProblemError(f"has more than {MAX_OPTIONAL_PARTS} parts that may be left out, before ?, * or {{0}}")
    if size.class_work > MAX_CLASS_WORK:
        raise ConstraintProblemError(TOO_MANY_CLASSES)
    return size


def _is_optional(token: Token) -> bool:
    return token[0] in ("?", "*") or (token.lastgroup == "counts" and token[0][1:].lstrip()[:1] in ("0", ","))


def _expanded_size(tokens: Sequence[Token]) -> int:
    sizes, last = [0], [0]  # of each group that is open, and of the last element in each of them
    brackets = 0
    for token in tokens:
        kind, text = token.lastgroup, token[0]
        if brackets:
            brackets += (kind == "bracket") - (text == "]")
        elif kind == "open":
            sizes.append(0)
            last.append(0)
        elif kind == "close":
            if len(sizes) > 1:
                last.pop()
                last[-1] = sizes.pop()
                sizes[-1] += last[-1]
        elif kind == "counts":
            count = max(int(number[:MAX_DIGITS]) for number in re.findall(r"\d+", text) or ["1"])
            added = last[-1] * max(count - 1, 0)
            last[-1] += added
            sizes[-1] += added
        elif text not in ("*", "+", "?", "|", "^", "$"):
            brackets = int(kind == "bracket")
            last[-1] = 1
            sizes[-1] += 1
    return sum(sizes)
