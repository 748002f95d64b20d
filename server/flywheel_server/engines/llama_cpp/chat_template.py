"""A model's chat template: tells whether a text is in it already, and puts the messages of a conversation into it.

The tokens of what the template writes and of the contents are made apart, so special tokens in a content stay plain text.
"""

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

from flywheel_server.engines.base import InvalidFieldError
from flywheel_server.engines.llama_cpp.llama import Llama, RefusedError
from flywheel_server.engines.llama_cpp.template_openings import any_of, openings
from flywheel_server.engines.llama_cpp.template_rendering import SPACES, MessageNotKeptError, render, without_markers
from flywheel_server.engines.llama_cpp.template_tokens import TemplateTokens, special_tokens_in
from flywheel_server.engines.llama_cpp.vocabulary import Vocabulary
from flywheel_server.messages import FieldViolation, Message

_ASSISTANT: Final = "assistant"

_USUAL_ROLES: Final = ("system", "user", _ASSISTANT)

_NO_ROLE: Final = "must be a role that the model's chat template knows, not the name of one of its special tokens"

_NOT_KEPT: Final = "must be a role for which the model's chat template writes the content"

_OWN_WORDS: Final = re.compile(r".*?\nError: (?:Jinja Exception: )?(.*)", re.DOTALL)
"""Matches the reason for which llama.cpp refuses messages; the group is what the template itself says."""


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
        self._vocabulary = vocabulary
        bos = llama.bos_token()
        try:
            before, after = render(llama, ["user"]).pieces
        except RefusedError as error:
            raise UnusableTemplateError(error.reason) from error
        except MessageNotKeptError as error:
            raise UnusableTemplateError("it leaves out the message of the user, or changes it") from error
        conversation = self._pieces("system", "user", _ASSISTANT, "user")
        self._source = "".join([llama.chat_template(), bos, before, after, *conversation])
        self._tokens = TemplateTokens.found_in(self._source, llama, vocabulary)
        self._openings = openings((before, after), conversation, bos=bos, special=any_of(self._tokens.special))

    def is_applied_to(self, text: str) -> bool:
        """Returns whether a text begins as the template does. Leading spaces and BOS make no difference."""
        return self._openings.match(text) is not None

    def prompt(self, messages: Sequence[Message]) -> list[Fragment]:
        """Returns the prompt of a conversation, which ends where the model's answer begins.

        A last message of the assistant is continued: it comes after the prompt of the messages before it, as it is. So a text
        that the model has begun has the prompt that it had. Its tokens may differ, though: the model may have written a word
        in several tokens that the tokenizer does not use, or special tokens, which are plain text here. And if the text ends
        within a token, such as after the space that begins a word, the model continues it less well.

        Special tokens in the contents are plain text. Otherwise, the tokens of the prompt are those that llama.cpp itself makes
        of the rendered template.

        Raises `InvalidFieldError` if the template refuses the messages, or does not keep each of them.
        """
        is_continued = messages[-1].role == _ASSISTANT
        rendered = messages[:-1] if is_continued else messages
        pieces, contents = self._rendered(rendered)
        if is_continued:
            contents.append(messages[-1].content)
            pieces.append("")
        return list(self._fragments(pieces, contents))

    def _pieces(self, *roles: str) -> list[str]:
        """Returns what the template writes before, between and after messages with these roles.

        Returns an empty list if the template rejects these roles or changes the messages.
        """
        try:
            return render(self._llama, roles).pieces
        except (RefusedError, MessageNotKeptError):
            return []

    def _rendered(self, messages: Sequence[Message]) -> tuple[list[str], list[str]]:
        """Returns what the template writes before, between and after the contents, and the contents in the order of the prompt.

        Raises `InvalidFieldError` as `prompt` does.
        """
        violations = [
            FieldViolation(f"messages[{index}].role", _NO_ROLE)
            for index, message in enumerate(messages)
            if self._makes_other_token_of(message.role)
        ]
        try:
            rendering = render(self._llama, [message.role for message in messages])
        except MessageNotKeptError as error:
            violations += [FieldViolation(f"messages[{index}].role", _NOT_KEPT) for index in error.indexes]
        except RefusedError as error:
            if not (found := _OWN_WORDS.match(error.reason)):
                raise
            words = without_markers(found[1])
            violations.append(FieldViolation("messages", f"must suit the model's chat template, which says: {words}"))
        if violations:
            raise InvalidFieldError.of(violations)
        return rendering.pieces, [place.written(messages[place.index].content) for place in rendering.places]

    def _makes_other_token_of(self, role: str) -> bool:
        """Returns whether a role might end a turn: as `end` does if the template writes `<|`, the role and `|>`."""
        if role in _USUAL_ROLES or f"'{role}'" in self._source or f'"{role}"' in self._source:
            return False
        return any(re.search(rf"(?<![a-z_]){role}(?![a-z_])", token) for token in self._tokens.special)

    def _tokens_of(self, pieces: Sequence[str]) -> TemplateTokens:
        """Returns the special tokens of the template, with those in the pieces.

        A template may make a token of a role, such as `<|tool|>`, so that its source does not have the token.
        """
        written = "\0".join(set(pieces))
        if special_tokens_in(written, self._vocabulary) <= self._tokens.special:
            return self._tokens
        return TemplateTokens.found_in(self._source + written, self._llama, self._vocabulary)

    def _fragments(self, pieces: Sequence[str], contents: Sequence[str]) -> Iterator[Fragment]:
        """Yields the prompt, cut at the template's special tokens that are nearest to each content.

        Only the fragments from one of these tokens to another have special tokens parsed.
        """
        tokens = self._tokens_of(pieces)
        # The texts since the last special token of the template; those with an odd index are contents.
        run: list[str] = []
        last = ""
        for number, piece in enumerate(pieces):
            found = list(tokens.control.finditer(piece))
            if not found:
                run.append(piece)
            else:
                start = found[0].start() if number else 0
                end = found[-1].end() if number < len(contents) else len(piece)
                run.append(piece[:start])
                yield from _plain(run, tokens, last, found[0][0])
                yield Fragment(piece[start:end], parse_special=True)
                run, last = [piece[end:]], found[-1][0]
            run += contents[number : number + 1]
        yield from _plain(run, tokens, last, "")


def _plain(texts: list[str], tokens: TemplateTokens, before: str, after: str) -> Iterator[Fragment]:
    """Yields the texts between these two special tokens of the template; those with an odd index are contents.

    Cuts each token in a content that llama.cpp would parse in spite of `parse_special`, after its first character.
    """
    if before in tokens.drop_spaces_after:
        _drop_first_spaces(texts)
    if after in tokens.drop_spaces_before:
        _drop_last_spaces(texts)
    text = "".join(texts)
    ends = list(accumulate(map(len, texts)))
    contents = [(end - len(each), end) for each, end in zip(texts[1::2], ends[1::2], strict=True) if each]
    content_ends = [end for _, end in contents]
    piece_start = at = 0
    while found := tokens.always_parsed.search(text, at):
        at = found.end()
        nearest = bisect_right(content_ends, found.start())
        if nearest == len(contents):
            break
        if contents[nearest][0] < found.end():
            at = found.start() + 1
            yield Fragment(text[piece_start:at], parse_special=False)
            piece_start = at
    if piece_start < len(text):
        yield Fragment(text[piece_start:], parse_special=False)


def _drop_first_spaces(texts: list[str]) -> None:
    for index, text in enumerate(texts):
        texts[index] = text.lstrip(SPACES)
        if texts[index]:
            break


def _drop_last_spaces(texts: list[str]) -> None:
    for index in reversed(range(len(texts))):
        texts[index] = texts[index].rstrip(SPACES)
        if texts[index]:
            break
