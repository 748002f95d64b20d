"""Shows tokens: as a table for people, and as JSON for programs."""

import json
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, Final
from unicodedata import east_asian_width

from flywheel_client._results import LikelyToken, PromptToken, Sample, Token

HEADINGS: Final = ("logprob", "probability", "token", "likeliest")


def quoted(text: bytes) -> str:
    """Returns the bytes of a token as a text in quotes, or as bytes in hexadecimal if they are not whole characters."""
    try:
        return json.dumps(text.decode(), ensure_ascii=False)
    except UnicodeDecodeError:
        return "".join(f"<0x{byte:02X}>" for byte in text)


def token_table(tokens: Sequence[Token], columns: int | None) -> Iterator[str]:
    """Yields a line of headings, and a line for each token.

    Args:
        tokens: The tokens of a sample.
        columns: The length to which lines are cut; None does not cut.
    """
    rows = [(f"{it.logprob:.3f}", _percent(it.logprob), _name(it), "  ".join(map(_likely, it.likeliest))) for it in tokens]
    width = max((len(name) for _, _, name, _ in rows), default=0)
    for logprob, percent, name, likeliest in (HEADINGS, *rows):
        line = f"{logprob:>8}  {percent:>11}  {name:{width}}  {likeliest}".rstrip()
        yield line if columns is None else _cut(line, columns)


def token_json(token: Token | LikelyToken | PromptToken) -> dict[str, Any]:
    """Returns all of a token for JSON: its bytes as numbers, and also as a text, with U+FFFD for parts of characters."""
    shown: dict[str, Any] = {"id": token.id, "text": token.text.decode(errors="replace"), "bytes": list(token.text)}
    if not isinstance(token, PromptToken):
        shown["logprob"] = token.logprob
    if isinstance(token, Token):
        shown["likeliest"] = [token_json(each) for each in token.likeliest]
    return shown


def sample_json(sample: Sample) -> dict[str, Any]:
    """Returns all of a sample for JSON. It has `tokens` only if the request has asked for them."""
    shown = {name: getattr(sample, name) for name in sample.__dataclass_fields__ if name != "tokens"}
    return shown | ({"tokens": [token_json(token) for token in sample.tokens]} if sample.tokens else {})


def _name(token: Token | LikelyToken) -> str:
    """Returns the text of a token, or its id if it adds no text, like a token that ends a sample."""
    return quoted(token.text) if token.text else f"id {token.id}"


def _likely(token: LikelyToken) -> str:
    return f"{_name(token)} {_percent(token.logprob)}"


def _cut(line: str, columns: int) -> str:
    """Returns the line, or its beginning and an ellipsis if it is too long for so many columns of a terminal."""
    widths = [2 if east_asian_width(character) in {"W", "F"} else 1 for character in line]
    if sum(widths) <= columns:
        return line
    return line[: bisect_right(list(accumulate(widths)), columns - 1)] + "…"


def _percent(logprob: float) -> str:
    return f"{math.exp(min(logprob, 0.0)):.1%}"
