"""Reads a model's vocabulary from the metadata of its GGUF file. llama.cpp does not tell the length and type of tokens."""

import re
from dataclasses import dataclass, field
from typing import Final, Self

from flywheel_server.engines.llama_cpp.gguf import Metadata

MODEL: Final = "tokenizer.ggml.model"
TOKENS: Final = "tokenizer.ggml.tokens"
TYPES: Final = "tokenizer.ggml.token_type"

_NORMAL: Final = 1
_UNKNOWN: Final = 2
_CONTROL: Final = 3
_USER_DEFINED: Final = 4
_BYTE: Final = 6
"""Types of tokens."""
_SPECIAL_TYPES: Final = (_UNKNOWN, _CONTROL, _USER_DEFINED)
"""llama.cpp first splits a text at tokens of these types, and then tokenizes each part between them separately."""

BPE: Final = "gpt2"
SENTENCEPIECE: Final = "llama"
"""Names of tokenizers in GGUF: byte-pair encoding of single words, and of the whole text."""

BETWEEN_WORDS: Final = re.compile(r"(?<=[^\W_])[ \n](?=\w)")
"""Matches where a text can be cut: at a single space or line break between two words.

In most models, no token contains the end of one word and this space or line break. An underscore does not count as the end of a
word, because many tokenizers keep it together with a line break.
"""

_BYTE_TOKEN: Final = re.compile(rb"<0x([0-9A-Fa-f]{2})>")
"""Matches a token of SentencePiece that stands for one byte."""

_SPANS_CUT: Final = re.compile(r"[^\W_][ \n]")

_PRINTABLE: Final = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_BYTES: Final = {
    **dict.fromkeys(range(0x100), ord("?")),
    **{0x100 + number: byte for number, byte in enumerate(sorted({*range(0x100)} - {*_PRINTABLE}))},
    **{byte: byte for byte in _PRINTABLE},
}
"""The byte that each character of a token stands for in GPT-2's byte-pair encoding; for `str.translate`."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens of a model.

    Attributes:
        tokenizer: The name of the tokenizer in GGUF.
        token_bytes: The bytes of text of each token, by token id. The bytes of a special token are its text, such as
            `<|im_start|>`. A token may have a part of a character.
        max_token_bytes: Maximum number of bytes of text in one token; None if there is no maximum.
        special_tokens: The texts of tokens such as `<|im_start|>`, at which llama.cpp splits a text before it tokenizes the
            text, and of normal tokens that llama.cpp may treat in this way.
        user_defined_tokens: The texts of the special tokens that llama.cpp parses in every text, even with
            `parse_special=False`.
        can_be_cut: Whether a text has the same tokens if it is cut `BETWEEN_WORDS`.
        separators: The texts of special tokens before which any text can be cut, because they are one token in every text.
    """

    tokenizer: str
    token_bytes: tuple[bytes, ...] = field(repr=False)
    max_token_bytes: int | None
    special_tokens: tuple[str, ...]
    user_defined_tokens: frozenset[str]
    can_be_cut: bool
    separators: tuple[str, ...]

    @classmethod
    def of(cls, metadata: Metadata) -> Self:
        """Returns the vocabulary in the metadata of a GGUF file; raises `KeyError` if there is none."""
        tokenizer = metadata[MODEL].decode()
        tokens = metadata[TOKENS]
        types = metadata.get(TYPES) or [_NORMAL] * len(tokens)
        is_known = tokenizer in (BPE, SENTENCEPIECE)
        pairs = list(zip(tokens, types, strict=False))
        token_bytes = tuple(_bytes(token, kind, tokenizer) for token, kind in pairs)
        lengths = (_length(token, kind, tokenizer) for token, kind in pairs)
        texts = [(text.decode(errors="replace"), kind) for text, kind in zip(token_bytes, types, strict=False)]
        special = [text for text, kind in texts if kind in _SPECIAL_TYPES and text]
        return cls(
            tokenizer,
            token_bytes,
            max(lengths, default=None) if is_known else None,
            tuple(text for text, kind in texts if text and (kind in _SPECIAL_TYPES or _looks_special(text, kind))),
            frozenset(text for text, kind in texts if kind == _USER_DEFINED),
            is_known and not any(_SPANS_CUT.search(text) for text, _ in texts),
            _separators(special) if is_known else (),
        )


def _looks_special(text: str, kind: int) -> bool:
    """Returns whether llama.cpp may treat a token of the normal type as a special token, as it does with `<|im_end|>`."""
    return kind == _NORMAL and len(text) > 2 and text[0] in "<[" and text[-1] in ">]"  # noqa: PLR2004 - more than the brackets


def _separators(special: list[str]) -> tuple[str, ...]:
    """Returns the special tokens that can neither overlap another special token nor be a part of one."""
    firsts = {text[0] for text in special}
    others = {character for text in special for character in text[1:]}
    return tuple(text for text in special if text[0] not in others and firsts.isdisjoint(text[1:]))


def _bytes(token: bytes, kind: int, tokenizer: str) -> bytes:
    """Returns the bytes of text that a token stands for."""
    if kind == _BYTE and (found := _BYTE_TOKEN.fullmatch(token)):
        return bytes.fromhex(found[1].decode())
    if kind != _NORMAL:
        return token
    if tokenizer == BPE:
        return token.decode(errors="replace").translate(_BYTES).encode("latin-1", "replace")
    return token.replace("▁".encode(), b" ")


def _length(token: bytes, kind: int, tokenizer: str) -> int:
    """Returns the number of bytes in the text of a token, or a little more."""
    if tokenizer == BPE and kind == _NORMAL:
        # In the vocabulary, each byte of the text is one character.
        return len(token.decode(errors="replace"))
    return len(token)
