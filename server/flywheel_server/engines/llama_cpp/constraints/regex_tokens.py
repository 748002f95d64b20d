"""The tokens of a regular expression, as far as its cost depends on them."""

import re
from collections.abc import Sequence
from typing import Final

Token = re.Match[str]

_TOKEN: Final = re.compile(
    r"""
      (?P<atom>\\[pPxuU]\{[^{}]*\} | \\[pP]. | \\. | \[:\^?[a-z]+:\] )
    | (?P<open>\( (?: \?P?<\w+> | \?[a-zA-Z-]*:? )? )
    | (?P<close>\))
    | (?P<counts>\{ \s* \d* \s* ,? \s* \d* \s* \} )
    | (?P<bracket>\[ \^? \]? )
    | (?P<rest>.)
    """,
    re.VERBOSE | re.DOTALL,
)
"""Matches a token. An `atom` is one character or class, and a `bracket` begins a class in brackets, or one within it."""


def tokens_of(regex: str) -> Sequence[Token]:
    """Returns the tokens of a regular expression, which may be invalid."""
    return tuple(_TOKEN.finditer(regex))


def has_flag(flag: str, tokens: Sequence[Token]) -> bool:
    """Returns whether the flag is set, or unset, anywhere in the expression."""
    return any(flag in token[0] and "<" not in token[0] for token in tokens if token.lastgroup == "open")
