r"""Estimates what it takes LLGuidance to read the classes of characters in a regular expression, such as `\w` and `[^\p{L}]`.

It reads each class as often as it is written, before any of its own limits applies. Without regard to case, it looks up the
other case of each character in brackets, one by one, and there are a million.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Final

from flywheel_server.engines.llama_cpp.constraints.regex_tokens import Token, has_flag

MAX_CLASS_WORK: Final = 12_000
"""Maximum work for the classes of all regular expressions of a constraint, in microseconds of CPU time."""

TOO_MANY_CLASSES: Final = (
    "has too many classes of characters, such as \\w. With the flag i, many of those in brackets cost most, such as [\\S], "
    "[a[b]] and [\\x{80}-\\x{ffff}]"
)

_READ: Final = 25
"""Microseconds for one part of a class, such as `\\w`, if case matters."""

_FOLD: Final = 200
"""Microseconds for one part of a class with at most 150,000 characters, without regard to case."""

_FOLD_ALL: Final = 5_500
"""Microseconds for one part of a class with any number of characters, without regard to case."""

_MAX_CHARACTER: Final = 0x10FFFF

_CLASSES: Final = frozenset("pPwWdDsS")
"""Letters that make a class after a backslash."""

_SMALL_CATEGORY: Final = re.compile(
    "[LMNPSZ][a-z]?|Alphabetic|Arabic|Armenian|Bengali|Cyrillic|Devanagari|Emoji|Georgian|Greek|Han|Hangul|Hebrew|Hiragana|"
    "Katakana|Latin|Letter|Lowercase|Number|Punctuation|Tamil|Thai|Uppercase"
)
"""Matches the names of common classes of Unicode with at most 150,000 characters. Names may be written in other ways too."""

_MAX_ESCAPED: Final = {r"\x": 0xFF, r"\u": 0xFFFF}
"""The last character that an escape without braces can stand for."""


def class_work(tokens: Sequence[Token]) -> int:
    """Returns about how many microseconds the classes of a regular expression take to read; rather too many than too few."""
    return sum(_works(tokens, ignores_case=has_flag("i", tokens)))


def _works(tokens: Sequence[Token], *, ignores_case: bool) -> Iterator[int]:
    brackets = 0
    previous = ""
    for token in tokens:
        text = token[0]
        if token.lastgroup == "bracket":
            brackets += 1
            if ignores_case and brackets > 1:
                yield _FOLD_ALL
        elif text == "]":
            brackets = max(brackets - 1, 0)
        elif ignores_case and brackets and previous == "-":
            yield _range_work(text)
        elif text[0] == "\\" and text[1:2] in _CLASSES:
            yield _fold_work(text, in_brackets=brackets > 0) if ignores_case else _READ
        previous = text


def _range_work(end: str) -> int:
    """Returns the work for the range in brackets whose end begins with this token."""
    if end[0] == "\\" and end[1:2].isalnum():
        return _FOLD_ALL * _MAX_ESCAPED.get(end, _MAX_CHARACTER) // _MAX_CHARACTER
    return _FOLD_ALL * ord(end[-1]) // _MAX_CHARACTER


def _fold_work(text: str, *, in_brackets: bool) -> int:
    r"""Returns the work for a class such as `\w`, without regard to case."""
    kind, name = text[1], text[2:].strip("{}")
    if kind in "pP":
        is_small = _SMALL_CATEGORY.fullmatch(name) and not (kind == "P" and in_brackets)
    else:
        is_small = not (kind.isupper() and in_brackets)
    return _FOLD if is_small else _FOLD_ALL
