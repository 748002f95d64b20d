"""The vocabulary of a model, from the metadata of its GGUF file. llama.cpp tells neither length nor type of tokens."""

import re
from dataclasses import dataclass
from typing import Final, Self

from flywheel_server.engines.llama_cpp.gguf import Metadata

MODEL: Final = "tokenizer.ggml.model"
TOKENS: Final = "tokenizer.ggml.tokens"
TYPES: Final = "tokenizer.ggml.token_type"

_NORMAL: Final = 1
_UNKNOWN: Final = 2
_CONTROL: Final = 3
_USER_DEFINED: Final = 4
"""Types of tokens."""
_FOUND_FIRST: Final = (_UNKNOWN, _CONTROL, _USER_DEFINED)
"""The types that are looked for before a text is tokenized. What is between two of them is tokenized by itself."""

BPE: Final = "gpt2"
SENTENCEPIECE: Final = "llama"
"""Models of tokenizers: byte-pair encoding of words, and of the whole text."""

BETWEEN_WORDS: Final = re.compile(r"(?<=[^\W_])[ \n](?=\w)")
"""A place where a text can be cut: a single space or line break between two words.

Most models have no token that reaches across it. An underscore ends no word: many tokenizers keep it with a line break.
"""

_REACHES_ACROSS: Final = re.compile(r"[^\W_][ \n]")

_PRINTABLE: Final = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_BYTES: Final = {
    **dict.fromkeys(range(0x100), ord("?")),
    **{0x100 + number: byte for number, byte in enumerate(sorted({*range(0x100)} - {*_PRINTABLE}))},
    **{byte: byte for byte in _PRINTABLE},
}
"""The byte that each character of a token stands for in byte-pair encoding, as GPT-2 has it; for `str.translate`."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens of a model.

    Attributes:
        tokenizer: Which model of tokenizer it is for, as GGUF names it.
        max_token_bytes: The most bytes of text that one token stands for; None if a token can stand for any number of them.
        special_tokens: The texts of the tokens that are looked for before a text is tokenized, such as `<|im_start|>`, and of
            those that llama.cpp may take for such.
        user_defined_tokens: The texts of those that are found in every text, also where special tokens are plain text.
        can_be_cut: Whether a text has the same tokens if it is cut `BETWEEN_WORDS`.
        separators: The texts of tokens before which any text can be cut, because they are one token wherever they are.
    """

    tokenizer: str
    max_token_bytes: int | None
    special_tokens: tuple[str, ...]
    user_defined_tokens: frozenset[str]
    can_be_cut: bool
    separators: tuple[str, ...]

    @classmethod
    def of(cls, metadata: Metadata) -> Self:
        """Return the vocabulary in the metadata of a GGUF file; raise `KeyError` if there is none."""
        tokenizer = metadata[MODEL].decode()
        tokens = metadata[TOKENS]
        types = metadata.get(TYPES) or [_NORMAL] * len(tokens)
        is_known = tokenizer in (BPE, SENTENCEPIECE)
        lengths = (_length(token, kind, tokenizer) for token, kind in zip(tokens, types, strict=False))
        texts = [(_text(token, kind, tokenizer), kind) for token, kind in zip(tokens, types, strict=False)]
        found_first = [text for text, kind in texts if kind in _FOUND_FIRST and text]
        return cls(
            tokenizer,
            max(lengths, default=None) if is_known else None,
            tuple(text for text, kind in texts if text and (kind in _FOUND_FIRST or _looks_special(text, kind))),
            frozenset(text for text, kind in texts if kind == _USER_DEFINED),
            is_known and not any(_REACHES_ACROSS.search(text) for text, _ in texts),
            _separators(found_first) if is_known else (),
        )


def _looks_special(text: str, kind: int) -> bool:
    """Return whether llama.cpp may take a token of an ordinary type for a special one, as it does with `<|im_end|>`."""
    return kind == _NORMAL and len(text) > 2 and text[0] in "<[" and text[-1] in ">]"  # noqa: PLR2004 - more than the brackets


def _separators(found_first: list[str]) -> tuple[str, ...]:
    """Returns the tokens that can neither overlap another one nor be part of one, of those that are found before all others."""
    firsts = {text[0] for text in found_first}
    laters = {character for text in found_first for character in text[1:]}
    return tuple(text for text in found_first if text[0] not in laters and firsts.isdisjoint(text[1:]))


def _text(token: bytes, kind: int, tokenizer: str) -> str:
    """Returns the text that a token stands for; of characters that it has only a part of, a replacement."""
    text = token.decode(errors="replace")
    if kind != _NORMAL:
        return text
    if tokenizer == BPE:
        return text.translate(_BYTES).encode("latin-1", "replace").decode(errors="replace")
    return text.replace("▁", " ")


def _length(token: bytes, kind: int, tokenizer: str) -> int:
    """Returns how many bytes of text a token stands for, or a little more."""
    if tokenizer == BPE and kind == _NORMAL:
        # Each byte is written as one character.
        return len(token.decode(errors="replace"))
    return len(token)
