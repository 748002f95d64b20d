"""A model's chat template: tells whether a text is in it already, and puts other texts into it.

llama.cpp renders the template. Rendering it around marker texts shows what the template itself writes, so that special tokens
in a caller's text stay plain text.
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
"""Texts that occur in no template. A template that does not change messages does not change these either."""

_SPACES: Final = " \t\n\v\f\r"
"""The characters that are spaces for llama.cpp."""


class UnusableTemplateError(Exception):
    """llama.cpp cannot put a message into the template. The text of the error says why."""


@dataclass(frozen=True, slots=True)
class Fragment:
    """A part of a prompt that has the same tokens by itself as within the whole.

    Special tokens in the text, such as `<|im_start|>`, are plain text unless `parse_special` is true.
    """

    text: str
    parse_special: bool


class ChatTemplate:
    """The chat template of a loaded model. Its methods block, and may be called from several threads.

    All of them, and the constructor, raise what `Llama.tokenize` does. The constructor also raises `UnusableTemplateError`.
    """

    def __init__(self, llama: Llama, vocabulary: Vocabulary) -> None:
        self._llama = llama
        bos = llama.bos_token()
        try:
            self._frame = self._render_frame()
        except RefusedError as error:
            raise UnusableTemplateError(error.reason) from error
        conversation = self._render_roles("system", "user", "assistant", "user")
        written = "".join([llama.chat_template(), bos, *self._frame, *conversation])
        special = [token for token in vocabulary.special_tokens if token in written and not token.isspace()]
        plain = {token: llama.tokenize(token, parse_special=False) for token in special}
        parsed = {token: llama.tokenize(token) for token in special}
        control = [token for token in special if len(parsed[token]) == 1 and parsed[token] != plain[token]]
        self._control = any_of(control)
        self._drops_spaces_after = {token for token in control if llama.tokenize(f"{token} \n") == parsed[token]}
        self._drops_spaces_before = {token for token in control if llama.tokenize(f" \n{token}") == parsed[token]}
        self._always_parsed = any_of(
            token for token in vocabulary.user_defined_tokens.intersection(special) if len(plain[token]) == 1 < len(token)
        )
        self._openings = openings(self._frame, conversation, bos=bos, special=any_of(special))

    def is_applied_to(self, text: str) -> bool:
        """Returns whether a text begins as the template does. Leading spaces and BOS make no difference."""
        return self._openings.match(text) is not None

    def prompt(self, text: str) -> list[Fragment]:
        """Returns the prompt with the text as a user's message.

        Special tokens in the text are plain text. Otherwise, the tokens of the prompt are those that llama.cpp itself makes of
        the rendered template.
        """
        rendered = self._llama.render_chat([("user", text)])
        before, after = self._frame_of(rendered)
        return list(self._fragments(before, rendered[len(before) : len(rendered) - len(after)], after))

    def _render_frame(self) -> tuple[str, str]:
        """Returns what the template writes before and after the message of a user."""
        before, found, after = self._llama.render_chat([("user", _MARKERS[0])]).partition(_MARKERS[0])
        if not found:
            raise UnusableTemplateError("it leaves out the message of the user, or changes it")
        return before, after

    def _render_roles(self, *roles: str) -> list[str]:
        """Returns what the template writes before, between and after messages with these roles.

        Returns an empty list if the template rejects these roles or changes the messages.
        """
        markers = _MARKERS[: len(roles)]
        try:
            rendered = self._llama.render_chat(list(zip(roles, markers, strict=True)))
        except RefusedError:
            return []
        pieces = re.split("|".join(markers), rendered)
        return pieces if len(pieces) == len(roles) + 1 else []

    def _frame_of(self, rendered: str) -> tuple[str, str]:
        """Returns what the template has written before and after the message of a user in this rendered prompt."""
        before, after = self._frame
        if not (rendered.startswith(before) and rendered.endswith(after)):
            # Some templates write the date, which has changed.
            self._frame = before, after = self._render_frame()
        # A text that still differs may come from the message, so it counts as the message.
        before = common_start(before, rendered)
        return before, common_start(after[::-1], rendered[len(before) :][::-1])[::-1]

    def _fragments(self, before: str, content: str, after: str) -> Iterator[Fragment]:
        """Yields the prompt, cut at the template's special tokens that are nearest to the message.

        Only the fragments outside these tokens may have special tokens parsed.
        """
        head, last = _cut_after_last(self._control, before)
        tail, first = _cut_before_first(self._control, after)
        inner = (before[len(head) :], content, after[: len(after) - len(tail)])
        if last in self._drops_spaces_after:
            inner = _without_first_spaces(inner)
        if first in self._drops_spaces_before:
            inner = _without_last_spaces(inner)
        if head:
            yield Fragment(head, parse_special=True)
        for text in self._plain_texts(*inner):
            yield Fragment(text, parse_special=False)
        if tail:
            yield Fragment(tail, parse_special=True)

    def _plain_texts(self, before: str, content: str, after: str) -> Iterator[str]:
        """Yields the text in pieces, and cuts each token in the content that llama.cpp would parse in spite of `parse_special`.

        A token is cut after its first character.
        """
        text = before + content + after
        start, end = len(before), len(before) + len(content)
        piece_start = at = 0
        while (found := self._always_parsed.search(text, at)) and found.start() < end:
            if found.end() <= start:
                at = found.end()
                continue
            at = found.start() + 1
            yield text[piece_start:at]
            piece_start = at
        if piece_start < len(text):
            yield text[piece_start:]


def _cut_after_last(tokens: re.Pattern[str], text: str) -> tuple[str, str]:
    """Returns the text up to and including the last of these tokens, and that token; both are empty if there is none."""
    found = deque(tokens.finditer(text), maxlen=1)
    return (text[: found[0].end()], found[0][0]) if found else ("", "")


def _cut_before_first(tokens: re.Pattern[str], text: str) -> tuple[str, str]:
    """Returns the text from the first of these tokens on, and that token; both are empty if there is none."""
    first = tokens.search(text)
    return (text[first.start() :], first[0]) if first else ("", "")


def _without_first_spaces(parts: tuple[str, str, str]) -> tuple[str, str, str]:
    before, content, after = parts
    before = before.lstrip(_SPACES)
    content = content if before else content.lstrip(_SPACES)
    return before, content, after if before or content else after.lstrip(_SPACES)


def _without_last_spaces(parts: tuple[str, str, str]) -> tuple[str, str, str]:
    after, content, before = (part[::-1] for part in _without_first_spaces((parts[2][::-1], parts[1][::-1], parts[0][::-1])))
    return before, content, after
