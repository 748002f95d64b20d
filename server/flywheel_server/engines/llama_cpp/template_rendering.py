"""Renders a chat template around markers in place of contents, and says how each content belongs into the rendered text.

The template never sees a content. So a content can neither act as a part of the template nor change what the template does.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from flywheel_server.engines.llama_cpp.llama import Llama

SPACES: Final = " \t\n\v\f\r"
"""The characters that are spaces for llama.cpp."""

_MARKER: Final = re.compile(r'flywheel7([0-9]+)(?:"\n|(\\"\\n))marker')
"""Matches a marker, or a marker as JSON has it. A marker occurs in no template. A role cannot be one, as it has no digits."""

_LINES: Final = "\n" * 8
"""More line breaks than a template writes in a row."""
_BEFORE: Final = f"{_LINES}\v"
_AFTER: Final = f"\v{_LINES}"
"""Texts around a marker, which show whether the template trims contents."""


class MessageNotKeptError(Exception):
    """The template leaves out the message with this `index`, repeats it, or changes more of it than the spaces at its ends."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.index = index


@dataclass(frozen=True, slots=True)
class Place:
    """The place of a content in a rendered template.

    Attributes:
        index: The index of the message.
        trims_start: The characters that the template trims from the start of the content; empty if it trims none.
        trims_end: The same for the end.
        escapes: Whether the template writes the content as JSON does.
    """

    index: int
    trims_start: str
    trims_end: str
    escapes: bool

    def written(self, content: str) -> str:
        """Returns the content as the template writes it."""
        # `lstrip` and `rstrip` with an empty text do nothing.
        content = content.lstrip(self.trims_start).rstrip(self.trims_end)
        return _as_json(content) if self.escapes else content


@dataclass(frozen=True, slots=True)
class Rendering:
    """A rendered template.

    Attributes:
        pieces: What the template itself writes before, between and after the contents.
        places: The places of the contents between the pieces. The template may change the order of messages.
    """

    pieces: list[str]
    places: list[Place]


def render(llama: Llama, roles: Sequence[str]) -> Rendering:
    """Renders messages with these roles. Raises `MessageNotKeptError`, and what `Llama.tokenize` does."""
    contents = [f'{_BEFORE}flywheel7{index}"\nmarker{_AFTER}' for index in range(len(roles))]
    rendered = llama.render_chat(list(zip(roles, contents, strict=True)))
    first, *rest = _MARKER.split(rendered)
    pieces, places = [first], []
    for index, escaped, text in zip(rest[::3], rest[1::3], rest[2::3], strict=True):
        before, after = (_as_json(_BEFORE), _as_json(_AFTER)) if escaped else (_BEFORE, _AFTER)
        pieces[-1], trims_start = _without_padding(pieces[-1], before)
        # The end is the start of the text that is written backwards.
        backwards, trims_end = _without_padding(text[::-1], after[::-1])
        pieces.append(backwards[::-1])
        places.append(Place(int(index), trims_start, trims_end, bool(escaped)))
    counts = Counter(place.index for place in places)
    for index in range(len(roles)):
        if counts[index] != 1:
            raise MessageNotKeptError(index)
    for place, (before, after) in zip(places, pairwise(pieces), strict=True):
        if "\v" in before + after:
            raise MessageNotKeptError(place.index)
    return Rendering(pieces, places)


def without_markers(text: str) -> str:
    """Returns the text with an ellipsis in place of each marker and the padding around it."""
    return re.sub(rf"\s*{_MARKER.pattern}\s*", "…", text)


def _without_padding(text: str, padding: str) -> tuple[str, str]:
    """Returns the text without the padding at its end, and the characters that the template has trimmed from the padding."""
    if text.endswith(padding):
        return text.removesuffix(padding), ""
    # The last character of the padding, or the text that JSON has for it, is no line break.
    inner = padding.replace(_LINES, "").replace(_as_json(_LINES), "").replace(_as_json(_LINES)[::-1], "")
    if text.endswith(inner):
        return text.removesuffix(inner), "\n"
    return text, SPACES


def _as_json(text: str) -> str:
    """Returns the text as JSON has it between quotes, as the filter `tojson` of llama.cpp writes it."""
    return json.dumps(text, ensure_ascii=False)[1:-1]
