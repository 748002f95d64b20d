"""Renders a chat template around markers in place of contents, and says how each content belongs into the rendered text.

The template never sees a content. So a content can neither act as a part of the template nor change what the template does.
"""

import json
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

from flywheel_server.engines.llama_cpp.llama import Llama

SPACES: Final = " \t\n\v\f\r"
"""The characters that are spaces for llama.cpp."""

_MARKER: Final = re.compile(r'flywheel7([0-9]+)(?:"\n|(\\"\\n))marker')
"""Matches a marker, or a marker as JSON has it. A marker occurs in no template. A role cannot be one, as it has no digits."""

_PADDING_LINES: Final = 8
_PADDING: Final = "\n" * _PADDING_LINES + "\v"
"""The text before a marker, which shows whether the template trims contents. The text after a marker is the same backwards."""

_MAX_TEMPLATE_SPACES: Final = 3
"""Maximum number of spaces and line breaks in a row that a template writes next to a content."""


class MessageNotKeptError(Exception):
    """The template leaves out the messages with these `indexes`, repeats them, or changes more than their outer spaces."""

    def __init__(self, indexes: Collection[int]) -> None:
        super().__init__(indexes)
        self.indexes = indexes


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
    contents = [f'{_PADDING}flywheel7{index}"\nmarker{_PADDING[::-1]}' for index in range(len(roles))]
    rendered = llama.render_chat(list(zip(roles, contents, strict=True)))
    first, *rest = _MARKER.split(rendered)
    pieces, places = [first], []
    changed: set[int] = set()
    for index, escaped, after in zip(rest[::3], rest[1::3], rest[2::3], strict=True):
        line, edge = map(_as_json, "\n\v") if escaped else "\n\v"
        try:
            pieces[-1], trims_start = _without_padding(pieces[-1], line, edge)
            # The padding after a marker is the one before it, backwards.
            backwards, trims_end = _without_padding(after[::-1], line[::-1], edge[::-1])
        except ValueError:
            changed.add(int(index))
            pieces.append(after)
            continue
        pieces.append(backwards[::-1])
        places.append(Place(int(index), trims_start, trims_end, bool(escaped)))
    counts = Counter(place.index for place in places)
    if unkept := [index for index in range(len(roles)) if counts[index] != 1 or index in changed]:
        raise MessageNotKeptError(unkept)
    return Rendering(pieces, places)


def without_markers(text: str) -> str:
    """Returns the text with an ellipsis in place of each marker and the padding around it."""
    return re.sub(rf"[\n\v]*{_MARKER.pattern}[\n\v]*", "…", text)


def _without_padding(text: str, line: str, edge: str) -> tuple[str, str]:
    """Returns the text without the padding at its end, and the characters that the template has trimmed from the padding.

    Arguments:
        text: What the template has written before a marker.
        line: How the template writes each line break of the padding.
        edge: How the template writes the last character of the padding.

    Raises `ValueError` if the template has changed the padding in another way.
    """
    if text.endswith(line * _PADDING_LINES + edge):
        return text.removesuffix(line * _PADDING_LINES + edge), ""
    if not text.endswith(edge):
        return text, SPACES
    text = text.removesuffix(edge)
    if len(text) - len(text.rstrip(f"{line} ")) > _MAX_TEMPLATE_SPACES:
        raise ValueError
    return text, "\n"


def _as_json(text: str) -> str:
    """Returns the text as JSON has it between quotes, as the filter `tojson` of llama.cpp writes it."""
    return json.dumps(text, ensure_ascii=False)[1:-1]
