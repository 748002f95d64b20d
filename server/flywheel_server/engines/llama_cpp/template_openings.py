"""Finds out how a text begins that is in a model's chat template already, from what the template writes around messages."""

import re
from collections.abc import Iterable, Sequence
from itertools import groupby, takewhile
from operator import itemgetter
from typing import Final

NOTHING: Final = r"\0(?!)"
"""A pattern that matches nothing. A search is fast, because it looks only at NUL characters."""


def openings(frame: tuple[str, str], conversation: Sequence[str], *, bos: str, special: re.Pattern[str]) -> re.Pattern[str]:
    """Returns a pattern that matches texts which begin as the template does, with a message of the system or of a user.

    Leading spaces and BOS make no difference. The pattern matches nothing if the template writes nothing before a message.

    Arguments:
        frame: What the template writes before and after a single message of a user.
        conversation: The five pieces that the template writes before, between and after messages of the system, a user, the
            assistant and the user; empty if it cannot have these messages.
        bos: The token with which a text begins (BOS); empty if there is none.
        special: A pattern that matches the special tokens that the template writes.
    """
    before, after = frame
    message_start = ""
    if (_with(bos, before) + after).count(bos) > 1:
        # BOS begins each message, and not only the text.
        message_start, bos = bos, ""
    start = _with(message_start, before.removeprefix(bos))
    starts = [start]
    patterns: list[str] = []
    if conversation:
        system, to_user, to_assistant, to_next_user, _ = conversation
        system, to_user = _with(message_start, system.removeprefix(bos)), to_user.strip()
        starts += [system, _start_of_user_message(start, to_assistant, to_next_user, special)]
        if bos and not system.strip() and special.match(to_user):
            # Nothing marks the system message itself, so the pattern looks for what comes before and after it.
            patterns.append(rf"{re.escape(bos)}(?s:.*?){re.escape(to_user)}")
    # If an opening ends with a word, that must be a whole word of the text.
    found = {_opening(each, special) for each in starts} - {""}
    patterns += [re.escape(opening) + (r"(?!\w)" if opening[-1].isalnum() else "") for opening in sorted(found)]
    ignored = rf"(?:\s|{re.escape(bos)})*" if bos else r"\s*"
    return re.compile(f"{ignored}(?:{'|'.join(patterns) or NOTHING})")


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Returns a pattern that matches any of these texts, at each place the longest one, as llama.cpp does.

    A search takes about the same time for any number of texts, because texts that begin alike share that part of the pattern.
    """
    return re.compile(_alternatives(texts) or NOTHING)


def _alternatives(texts: Iterable[str]) -> str:
    branches = []
    for _, group in groupby(sorted(set(texts)), key=itemgetter(0)):
        alike = list(group)
        prefix = alike[0][: _common_length(alike[0], alike[-1])]
        rests = [text.removeprefix(prefix) for text in alike]
        rest = _alternatives(filter(None, rests))
        branches.append(re.escape(prefix) + (f"(?:{rest}){'' if all(rests) else '?'}" if rest else ""))
    return "|".join(branches)


def _common_length(one: Sequence[str], other: Sequence[str]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _with(prefix: str, text: str) -> str:
    """Returns the text with the prefix, which llama.cpp may have left out because it adds that token itself."""
    return prefix + text.removeprefix(prefix)


def _opening(start: str, special: re.Pattern[str]) -> str:
    """Returns how a rendered prompt begins: its first special tokens and the role after them, or else its first line."""
    start = start.lstrip()
    at = 0
    while found := special.match(start, at):
        at = found.end()
    if at == 0:
        return start.partition("\n")[0].rstrip()
    # A role is a single word. Anything else is the text of a message, such as the template's own system message.
    role = re.match(rf"\w+(?:{special.pattern}|(?=\s|$))", start[at:])
    return start[:at] + (role[0] if role else "")


def _start_of_user_message(start: str, to_assistant: str, to_user: str, special: re.Pattern[str]) -> str:
    """Returns what the template writes before each message of a user, whatever comes before that.

    Arguments:
        start: What comes before a user's message that is the first one. It may have the template's own system message.
        to_assistant: What comes between the messages of a user and the assistant.
        to_user: What comes between the messages of the assistant and a user.
        special: A pattern that matches special tokens.
    """
    first, last = _units(start, special), _units(to_user, special)
    shared = last[len(last) - _common_length(first[::-1], last[::-1]) :]
    if first and special.fullmatch(first[0]) and first[0] in shared:
        # Each message begins with the token that the first one begins with.
        return "".join(shared[len(shared) - 1 - shared[::-1].index(first[0]) :])
    # What ends the message before the user's also comes before other messages, so it is removed.
    return "".join(shared[_common_length(shared, _units(to_assistant, special)) :])


def _units(text: str, special: re.Pattern[str]) -> list[str]:
    """Returns the special tokens, the line breaks, and the texts between them, in order."""
    return [unit for unit in re.split(f"({special.pattern}|\n)", text) if unit]
