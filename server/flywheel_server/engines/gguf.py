"""The vocabulary of a GGUF file, read from its metadata.

llama.cpp tells neither how long tokens are nor which of them are special. The format is that of
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The package `gguf` reads it too, but needs numpy, and seconds for
the vocabulary of a large model.
"""

import mmap
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

_NUMBERS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""The types of values that are numbers, and their formats for `struct`."""
_STRING: Final = 8
_ARRAY: Final = 9

_MODEL: Final = "tokenizer.ggml.model"
_TOKENS: Final = "tokenizer.ggml.tokens"
_TYPES: Final = "tokenizer.ggml.token_type"
_ADDS_END: Final = "tokenizer.ggml.add_eos_token"

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
_BYTES: Final = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(0x100 + number): byte for number, byte in enumerate(sorted({*range(0x100)} - {*_PRINTABLE}))
}
"""The byte that each character of a token stands for in byte-pair encoding, as GPT-2 has it."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens of a model.

    Attributes:
        tokenizer: Which model of tokenizer it is for, as GGUF names it.
        max_token_bytes: The most bytes of text that one token stands for; None if a token can stand for any number of them.
        special_tokens: The texts of its special tokens, such as `<|im_start|>`.
        can_be_cut: Whether a text has the same tokens if it is cut `BETWEEN_WORDS`.
        separators: The texts of tokens before which any text can be cut, because they are one token wherever they are.
    """

    tokenizer: str
    max_token_bytes: int | None
    special_tokens: tuple[str, ...]
    can_be_cut: bool
    separators: tuple[str, ...]

    @classmethod
    def read(cls, model: Path) -> Self:
        """Returns the vocabulary of a GGUF file; raises `OSError`, or `ValueError` if it is no GGUF file with a vocabulary."""
        with model.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                found = {
                    name: value for name, value in _Reader(data).metadata() if name in (_MODEL, _TOKENS, _TYPES, _ADDS_END)
                }
                tokenizer = found[_MODEL].decode()
                tokens = found[_TOKENS]
                types = found.get(_TYPES) or [_NORMAL] * len(tokens)
            except (struct.error, KeyError, IndexError, UnicodeDecodeError) as error:
                raise ValueError(f"{model} is not a GGUF file with a vocabulary") from error
        is_known = tokenizer in (BPE, SENTENCEPIECE)
        # If a token is added to the end of each text, the first piece would end with that token, too.
        can_be_cut = is_known and not found.get(_ADDS_END)
        lengths = (_length(token, kind, tokenizer) for token, kind in zip(tokens, types, strict=False))
        texts = [(_text(token, kind, tokenizer), kind) for token, kind in zip(tokens, types, strict=False)]
        return cls(
            tokenizer,
            max(lengths, default=None) if is_known else None,
            tuple(text for text, kind in texts if kind in (_UNKNOWN, _CONTROL) and text),
            can_be_cut and not any(_REACHES_ACROSS.search(text) for text, _ in texts),
            _separators([text for text, kind in texts if kind in _FOUND_FIRST and text]) if can_be_cut else (),
        )


def _separators(found_first: list[str]) -> tuple[str, ...]:
    """Returns those of the tokens that are found before all others which can neither overlap another nor be part of one."""
    firsts = {text[0] for text in found_first}
    laters = {character for text in found_first for character in text[1:]}
    return tuple(text for text in found_first if text[0] not in laters and firsts.isdisjoint(text[1:]))


def _text(token: bytes, kind: int, tokenizer: str) -> str:
    """Returns the text that a token stands for; of characters that it has only a part of, a replacement."""
    text = token.decode(errors="replace")
    if kind != _NORMAL:
        return text
    if tokenizer == BPE:
        return bytes(_BYTES.get(character, ord("?")) for character in text).decode(errors="replace")
    return text.replace("▁", " ")


def _length(token: bytes, kind: int, tokenizer: str) -> int:
    """Returns how many bytes of text a token stands for, or a little more."""
    if tokenizer == BPE and kind == _NORMAL:
        # Each byte is written as one character.
        return len(token.decode(errors="replace"))
    return len(token)


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0

    def metadata(self) -> Iterator[tuple[str, Any]]:
        """Yields the names and values of the file."""
        magic, _version, _tensors, count = self._unpack("4sIQQ")
        if magic != b"GGUF":
            raise KeyError(magic)
        for _ in range(count):
            name = self._string().decode()
            (kind,) = self._unpack("I")
            yield name, self._value(kind)

    def _value(self, kind: int) -> Any:  # noqa: ANN401 - a number, text, or a list of them
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._unpack(_NUMBERS[kind])[0]
        (of, count) = self._unpack("IQ")
        if of in _NUMBERS:
            return self._unpack(f"{count}{_NUMBERS[of]}")
        return [self._value(of) for _ in range(count)]

    def _string(self) -> bytes:
        (length,) = self._unpack("Q")
        start, self._at = self._at, self._at + length
        return self._data[start : self._at]

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{layout}", self._data, self._at)
        self._at += struct.calcsize(f"<{layout}")
        return values
