"""Writes the texts of a call as attributes of its span, in the JSON of the semantic conventions for GenAI."""

import json
from bisect import bisect_right
from collections.abc import Sequence
from typing import Final

MAX_TEXT_CHARACTERS: Final = 16_384
"""Maximum length of the JSON of all prompts of a call, and of that of all samples."""

_quoted: Final = json.JSONEncoder(ensure_ascii=False).encode


def text_attributes(direction: str, texts: Sequence[tuple[str, str]], max_characters: int) -> dict[str, str | int]:
    """Returns the texts of a call as one attribute, `gen_ai.{direction}.messages`.

    The attribute is always valid JSON, and has the beginning of the texts if they are too long. Then a second attribute,
    `flywheel.{direction}.omitted_characters`, says how many characters of the texts are missing.

    Arguments:
        direction: Whether the caller sent the texts or gets them: input or output.
        texts: The role and the text of each message. Empty texts are left out.
        max_characters: Maximum length of the JSON. If it has no room for any text, there is no first attribute.
    """
    messages, kept = _json_of(texts, min(max_characters, MAX_TEXT_CHARACTERS))
    attributes: dict[str, str | int] = {f"gen_ai.{direction}.messages": messages} if kept else {}
    if omitted := sum(len(text) for _, text in texts) - kept:
        attributes[f"flywheel.{direction}.omitted_characters"] = omitted
    return attributes


def _json_of(texts: Sequence[tuple[str, str]], max_characters: int) -> tuple[str, int]:
    """Returns the beginning of the texts as a JSON array, and how many characters of the texts it has."""
    messages: list[str] = []
    kept, left = 0, max_characters - len("[]")
    for role, text in texts:
        if not text:
            continue
        length = _fitting(role, text, left)
        if length:
            messages.append(_message(role, text[:length]))
            kept += length
            left -= len(messages[-1]) + len(", ")
        if length < len(text):
            break  # a later message that fits would hide the gap
    return f"[{', '.join(messages)}]", kept


def _fitting(role: str, text: str, max_characters: int) -> int:
    """Returns how many characters of the text a message may have, so that its JSON has at most `max_characters`."""
    if len(text) <= max_characters and len(_message(role, text)) <= max_characters:
        return len(text)
    lengths = range(min(len(text), max(max_characters, 0)) + 1)
    return max(bisect_right(lengths, max_characters, key=lambda length: len(_message(role, text[:length]))) - 1, 0)


def _message(role: str, text: str) -> str:
    # Text of an engine of one's own may have surrogates. OTLP cannot carry them, and all spans sent with them would be lost.
    content = text.encode("utf-8", "replace").decode()
    # Three times as fast as to encode a dictionary. A call may have hundreds of messages.
    return f'{{"role": {_quoted(role)}, "parts": [{{"type": "text", "content": {_quoted(content)}}}]}}'
