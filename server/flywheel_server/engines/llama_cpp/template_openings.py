"""How a text begins that brings a model's chat template along, told from what the template writes around messages."""

import re
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Final

_ROLES: Final = 5
"""Pieces of a template around the messages of a system, a user, an assistant, and a user."""


def openings(
    around: tuple[str, str], conversation: Sequence[str], *, bos: str, special: re.Pattern[str] | None
) -> re.Pattern[str] | None:
    """Return the pattern of texts that begin as the template does, with the message of a system or of a user.

    Spaces before it do not count, nor whether the token is there that begins a text. A template that begins with the message
    itself has no opening, and None is returned.

    Arguments:
        around: What the template writes before and after a single message of a user.
        conversation: What it writes before, between and after messages of a system, a user, an assistant and a user; empty if
            it cannot have these.
        bos: The token that begins a text; empty if there is none.
        special: The special tokens that the template writes.
    """
    before, after = around
    if (_with(bos, before) + after).count(bos) > 1:
        # It begins each turn, and not only the text.
        begins_turns, bos = bos, ""
    else:
        begins_turns = ""
    start = _with(begins_turns, before.removeprefix(bos))
    starts = [start]
    patterns: list[str] = []
    if len(conversation) == _ROLES:
        system, to_user, to_assistant, to_next_user, _ = conversation
        system, to_user = _with(begins_turns, system.removeprefix(bos)), to_user.strip()
        starts += [system, _turn_of_user(start, to_assistant, to_next_user, special)]
        if bos and special and not system.strip() and special.match(to_user):
            # A system message without a sign is told by what is before and after it.
            patterns.append(rf"{re.escape(bos)}(?s:.*?){re.escape(to_user)}")
    # A word that ends an opening ends in the text, too.
    found = {_opening(each, special) for each in starts} - {""}
    patterns += [re.escape(opening) + (r"(?!\w)" if opening[-1].isalnum() else "") for opening in sorted(found)]
    ignored = rf"(?:\s|{re.escape(bos)})*" if bos else r"\s*"
    return re.compile(f"{ignored}(?:{'|'.join(patterns)})") if patterns else None


def any_of(texts: Iterable[str]) -> re.Pattern[str] | None:
    """Return the pattern of any of these texts, the longest first, as llama.cpp looks for them; None if there are none."""
    joined = "|".join(map(re.escape, sorted(texts, key=len, reverse=True)))
    return re.compile(joined) if joined else None


def common_start(one: str, other: str) -> str:
    """Return the longest start that both texts have."""
    return one[: _common_length(one, other)]


def _common_length(one: Sequence[str], other: Sequence[str]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _with(start: str, text: str) -> str:
    """Return the text with a start that llama.cpp leaves out if it adds that token itself."""
    return start + text.removeprefix(start)


def _opening(start: str, special: re.Pattern[str] | None) -> str:
    """Return how a rendered prompt begins: its first special tokens and the role after them, or else its first line."""
    start = start.lstrip()
    at = 0
    while special and (found := special.match(start, at)):
        at = found.end()
    if at == 0 or special is None:
        return start.partition("\n")[0].rstrip()
    # What is not a single word is the text of a message, such as that of a system message of the template's own.
    role = re.match(rf"\w+(?:{special.pattern}|(?=\s|$))", start[at:])
    return start[:at] + (role[0] if role else "")


def _turn_of_user(start: str, to_assistant: str, to_user: str, special: re.Pattern[str] | None) -> str:
    """Return how the turn of a user begins, whatever is before it.

    Arguments:
        start: What is before the message of a user that is the first one; the template may have a system message of its own.
        to_assistant: What is between the messages of a user and an assistant.
        to_user: What is between the messages of an assistant and a user.
        special: Special tokens.
    """
    first, last = _units(start, special), _units(to_user, special)
    shared = last[len(last) - _common_length(first[::-1], last[::-1]) :]
    if special and first and special.fullmatch(first[0]) and first[0] in shared:
        # Each turn begins with the token that the first one begins with.
        return "".join(shared[len(shared) - 1 - shared[::-1].index(first[0]) :])
    # What ends the turn before ends other turns as well.
    return "".join(shared[_common_length(shared, _units(to_assistant, special)) :])


def _units(text: str, special: re.Pattern[str] | None) -> list[str]:
    """Return the special tokens, the line breaks, and what is between them."""
    return [unit for unit in re.split(f"({special.pattern}|\n)" if special else "(\n)", text) if unit]
