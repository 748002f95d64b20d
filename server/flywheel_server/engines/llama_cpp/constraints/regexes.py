"""Checks the cost of a regular expression, and quotes it for a grammar."""

import re
from typing import Final

from flywheel_server.engines.llama_cpp.constraints.constraint_problem import ConstraintProblemError

MAX_REGEX_STEPS: Final = 2_000
"""Maximum number of characters that a regular expression describes, with each counted repetition written out."""

TOKEN: Final = re.compile(
    r"""
      (?P<atom>\\[pPxuU]\{[^{}]*\} | \\. )
    | (?P<open>\( (?: \?P?<\w+> | \?[a-zA-Z-]*:? )? )
    | (?P<close>\))
    | (?P<counts>\{ \s* \d* \s* ,? \s* \d* \s* \} )
    | (?P<bracket>\[ \^? \]? )
    | (?P<rest>.)
    """,
    re.VERBOSE | re.DOTALL,
)

MAX_DIGITS: Final = 9
"""Digits of a count that are looked at. A count with more is too large anyway."""


def lark_regex(regex: str) -> str:
    """Returns the regular expression as LLGuidance's Lark syntax writes it, between slashes.

    Raises `ConstraintProblemError` if the expression is too large.
    """
    check_size(regex)
    escapes = {"/": r"\/", "\n": r"\n", "\r": r"\r", "\t": r"\t"}
    # A backslash before a slash or a line break belongs to it, and is not doubled.
    escaped = re.sub(r"\\?([/\n\r\t])|\\.", lambda match: escapes.get(match[1], match[0]), regex, flags=re.DOTALL)
    return f"/{escaped}/"


def check_size(regex: str) -> None:
    """Raises `ConstraintProblemError` if the expression has too many steps, or a syntax in which they cannot be counted."""
    if any("x" in token[0] and "<" not in token[0] for token in TOKEN.finditer(regex) if token.lastgroup == "open"):
        raise ConstraintProblemError("has the flag x, which is not supported")
    if expanded_size(regex) > MAX_REGEX_STEPS:
        raise ConstraintProblemError(f"has more than {MAX_REGEX_STEPS} characters when its counted repetitions are written out")


def expanded_size(regex: str) -> int:
    """Returns about how many characters the expression describes, with each counted repetition written out.

    The expression may be invalid: LLGuidance finds that out, but may work long if there are many repetitions.
    """
    sizes, last = [0], [0]  # of each group that is open, and of the last element in each of them
    brackets = 0
    for token in TOKEN.finditer(regex):
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
