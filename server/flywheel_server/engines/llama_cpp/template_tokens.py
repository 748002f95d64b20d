"""The special tokens that a chat template writes, and how llama.cpp treats each of them."""

import re
from dataclasses import dataclass
from typing import Final, Self

from flywheel_server.engines.llama_cpp.llama import Llama
from flywheel_server.engines.llama_cpp.template_openings import any_of
from flywheel_server.engines.llama_cpp.vocabulary import Vocabulary

_LOOKS_SPECIAL: Final = re.compile(r"<.+>|\[.+\]")
_LOOKS_LIKE_HTML: Final = re.compile(r"</?[a-z]+[0-9]*>")


@dataclass(frozen=True, slots=True)
class TemplateTokens:
    """The special tokens in what a template writes, and those with which a content could act as a part of a prompt.

    Attributes:
        special: The tokens that the template writes.
        control: Matches the tokens that llama.cpp parses only with `parse_special`.
        always_parsed: Matches the tokens that llama.cpp parses in every text, and that would not be plain text in a content:
            those that the template writes, and others that look special, such as `[REFERENCE_DOC_0]`. Tags of HTML look so
            too, but are plain text: a vocabulary has them so that the model reads HTML better.
        drop_spaces_after: The control tokens after which llama.cpp drops spaces.
        drop_spaces_before: The control tokens before which llama.cpp drops spaces.
    """

    special: frozenset[str]
    control: re.Pattern[str]
    always_parsed: re.Pattern[str]
    drop_spaces_after: frozenset[str]
    drop_spaces_before: frozenset[str]

    @classmethod
    def found_in(cls, written: str, llama: Llama, vocabulary: Vocabulary) -> Self:
        """Returns the special tokens that are in this text; raises what `Llama.tokenize` does."""
        special = special_tokens_in(written, vocabulary)
        plain = {token: llama.tokenize(token, parse_special=False) for token in special}
        parsed = {token: llama.tokenize(token) for token in special}
        control = [token for token in special if len(parsed[token]) == 1 and parsed[token] != plain[token]]
        always_parsed = {token for token in vocabulary.user_defined_tokens & special if len(plain[token]) == 1 < len(token)}
        always_parsed.update(filter(_looks_special, vocabulary.user_defined_tokens))
        return cls(
            special,
            any_of(control),
            any_of(always_parsed),
            frozenset(token for token in control if llama.tokenize(f"{token} \n") == parsed[token]),
            frozenset(token for token in control if llama.tokenize(f" \n{token}") == parsed[token]),
        )


def special_tokens_in(text: str, vocabulary: Vocabulary) -> frozenset[str]:
    """Returns the special tokens of the vocabulary that are in the text, without tokens of spaces only."""
    return frozenset(token for token in vocabulary.special_tokens if token in text and not token.isspace())


def _looks_special(token: str) -> bool:
    return bool(_LOOKS_SPECIAL.fullmatch(token)) and not _LOOKS_LIKE_HTML.fullmatch(token)
