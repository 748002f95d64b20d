"""A model's chat template: which texts bring it along, and which part of a prompt is its structure, which the caller's text.

llama.cpp renders it. What the template itself writes is found by rendering it around marker texts.
"""

import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from flywheel_server.engines.llama_cpp.llama import Llama, RefusedError
from flywheel_server.engines.llama_cpp.template_openings import any_of, common_start, openings
from flywheel_server.engines.llama_cpp.vocabulary import Vocabulary

_MARKERS: Final = tuple(f"flywheel7marker{number}end" for number in range(4))
"""Texts that no template holds, and none changes that leaves messages as they are."""

_SPACES: Final = " \t\n\v\f\r"
"""What llama.cpp takes for spaces."""


class UnusableTemplateError(Exception):
    """llama.cpp cannot put a message into the template; says why."""


@dataclass(frozen=True, slots=True)
class Fragment:
    """A part of a prompt that has the same tokens by itself as within the whole.

    Attributes:
        text: The text.
        parse_special: Whether special tokens in it are such, rather than plain text.
    """

    text: str
    parse_special: bool


class ChatTemplate:
    """The chat template of a loaded model. Its methods block, and may be called from several threads.

    Raises `UnusableTemplateError`, and what `Llama.tokenize` does.
    """

    def __init__(self, llama: Llama, vocabulary: Vocabulary) -> None:
        self._llama = llama
        bos = llama.bos_token()
        try:
            self._around = self._render_around_content()
        except RefusedError as error:
            raise UnusableTemplateError(error.reason) from error
        conversation = self._render_roles("system", "user", "assistant", "user")
        written = "".join([llama.chat_template(), bos, *self._around, *conversation])
        special = [token for token in vocabulary.special_tokens if token in written and not token.isspace()]
        plain = {token: llama.tokenize(token, parse_special=False) for token in special}
        parsed = {token: llama.tokenize(token) for token in special}
        control = [token for token in special if len(parsed[token]) == 1 and parsed[token] != plain[token]]
        self._control = any_of(control)
        self._drops_spaces_after = {token for token in control if llama.tokenize(f"{token} \n") == parsed[token]}
        self._drops_spaces_before = {token for token in control if llama.tokenize(f" \n{token}") == parsed[token]}
        self._found_always = any_of(
            token for token in vocabulary.user_defined_tokens.intersection(special) if len(plain[token]) == 1 < len(token)
        )
        self._openings = openings(self._around, conversation, bos=bos, special=any_of(special))

    def is_brought_by(self, text: str) -> bool:
        """Return whether a text begins as the template does, spaces and the token that begins a text aside."""
        return bool(self._openings and self._openings.match(text))

    def prompt(self, text: str) -> list[Fragment]:
        """Return the prompt with the text as a user's message.

        Its tokens are those of the rendered template, except that special tokens in the text are plain text. If the text has
        none, they are those that llama.cpp itself makes.
        """
        rendered = self._llama.render_chat([("user", text)])
        before, after = self._structure_of(rendered)
        return list(self._fragments(before, rendered[len(before) : len(rendered) - len(after)], after))

    def _render_around_content(self) -> tuple[str, str]:
        """Return what the template writes before and after the message of a user."""
        before, found, after = self._llama.render_chat([("user", _MARKERS[0])]).partition(_MARKERS[0])
        if not found:
            raise UnusableTemplateError("it leaves out the message of the user, or changes it")
        return before, after

    def _render_roles(self, *roles: str) -> list[str]:
        """Return what the template writes before, between and after messages with these roles; nothing if it cannot."""
        markers = _MARKERS[: len(roles)]
        try:
            rendered = self._llama.render_chat(list(zip(roles, markers, strict=True)))
        except RefusedError:
            return []
        pieces = re.split("|".join(markers), rendered)
        return pieces if len(pieces) == len(roles) + 1 else []

    def _structure_of(self, rendered: str) -> tuple[str, str]:
        """Return what the template has written before and after the message of a user in a rendered prompt."""
        before, after = self._around
        if not (rendered.startswith(before) and rendered.endswith(after)):
            # Some templates write the date.
            self._around = before, after = self._render_around_content()
        # Whatever is not as in every prompt may come from the message.
        before = common_start(before, rendered)
        return before, common_start(after[::-1], rendered[len(before) :][::-1])[::-1]

    def _fragments(self, before: str, content: str, after: str) -> Iterator[Fragment]:
        """Yield the prompt, cut at the special tokens of the template that are nearest to the message."""
        head, last = _cut_after_last(self._control, before)
        tail, first = _cut_before_first(self._control, after)
        inner = (before[len(head) :], content, after[: len(after) - len(tail)])
        if last in self._drops_spaces_after:
            inner = _without_first_spaces(inner)
        if first in self._drops_spaces_before:
            inner = _without_last_spaces(inner)
        if head:
            yield Fragment(head, parse_special=True)
        for text in self._inactive(*inner):
            yield Fragment(text, parse_special=False)
        if tail:
            yield Fragment(tail, parse_special=True)

    def _inactive(self, before: str, content: str, after: str) -> Iterator[str]:
        """Yield the text in pieces, so that no token of the template which llama.cpp finds in every text is in the content."""
        text = before + content + after
        start, end = len(before), len(before) + len(content)
        begun = at = 0
        while self._found_always and (found := self._found_always.search(text, at)) and found.start() < end:
            if found.end() <= start:
                at = found.end()
                continue
            at = found.start() + 1
            yield text[begun:at]
            begun = at
        if begun < len(text):
            yield text[begun:]


def _cut_after_last(tokens: re.Pattern[str] | None, text: str) -> tuple[str, str]:
    """Return the text up to the last of these tokens, and that token; empty if there is none."""
    found = deque(tokens.finditer(text), maxlen=1) if tokens else ()
    return (text[: found[0].end()], found[0][0]) if found else ("", "")


def _cut_before_first(tokens: re.Pattern[str] | None, text: str) -> tuple[str, str]:
    """Return the text from the first of these tokens on, and that token; empty if there is none."""
    first = tokens.search(text) if tokens else None
    return (text[first.start() :], first[0]) if first else ("", "")


def _without_first_spaces(parts: tuple[str, str, str]) -> tuple[str, str, str]:
    before, content, after = parts
    before = before.lstrip(_SPACES)
    content = content if before else content.lstrip(_SPACES)
    return before, content, after if before or content else after.lstrip(_SPACES)


def _without_last_spaces(parts: tuple[str, str, str]) -> tuple[str, str, str]:
    after, content, before = (part[::-1] for part in _without_first_spaces((parts[2][::-1], parts[1][::-1], parts[0][::-1])))
    return before, content, after
