"""Reads the metadata of a GGUF file.

The format is described in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The package `gguf` reads it too, but needs
numpy, and takes seconds for the vocabulary of a large model.
"""

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

MAGIC: Final = b"GGUF"

_NUMBERS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""The types of numbers, and their formats for `struct`."""
_LENGTH: Final = struct.Struct("<Q")
"""The length of a text in bytes, which comes before the text."""
_STRING: Final = 8
_ARRAY: Final = 9

_MAX_COUNT: Final = 2**26
"""Maximum length of a text in bytes, and of a list in values. A damaged file may claim any length, which must not fill the
memory."""

Metadata = dict[str, Any]
"""The values of a file by name: numbers, texts as bytes, tuples of numbers, and lists of texts."""


class NotGgufError(ValueError):
    """The file is no GGUF file, or it is damaged or incomplete."""


def read_metadata(file: Path) -> tuple[Metadata, int]:
    """Returns the metadata of a GGUF file and its number of tensors; raises `OSError` or `NotGgufError`."""
    with file.open("rb") as opened:
        try:
            data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise NotGgufError("it is empty") from None
        with data:
            _check_head(data[:8])
            reader = _Reader(data)
            metadata: Metadata = {}
            try:
                for name, value in reader.metadata():
                    if name in metadata:
                        raise NotGgufError(f"it has {name} twice")
                    metadata[name] = value
            except (struct.error, KeyError, IndexError, UnicodeDecodeError) as error:
                raise NotGgufError("its metadata are damaged, or end early: was it downloaded to its end?") from error
            return metadata, reader.tensors


def _check_head(head: bytes) -> None:
    if not head.startswith(MAGIC):
        if head.startswith(b"version "):
            raise NotGgufError("it is a pointer of Git LFS, not the model itself: run git lfs pull where it is from")
        raise NotGgufError("it does not begin as a GGUF file does")
    if head[4:6] == b"\0\0" and any(head[6:8]):
        raise NotGgufError("it is a GGUF file for big-endian machines")


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0
        self.tensors = 0

    def metadata(self) -> Iterator[tuple[str, Any]]:
        """Yields the name and value of each entry; sets `tensors`."""
        _magic, _version, self.tensors, count = self._unpack("4sIQQ")
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
        if count > _MAX_COUNT:
            raise IndexError(count)
        if of == _STRING:
            return list(self._strings(count))
        # llama.cpp does not support lists of lists either: KeyError.
        return self._unpack(f"{count}{_NUMBERS[of]}")

    def _string(self) -> bytes:
        return next(self._strings(1))

    def _strings(self, count: int) -> Iterator[bytes]:
        # A vocabulary has hundreds of thousands of texts, and the start of the server waits for them, so this loop is fast.
        data, end = self._data, len(self._data)
        for _ in range(count):
            (length,) = _LENGTH.unpack_from(data, self._at)
            start = self._at + _LENGTH.size
            self._at = start + length
            if self._at > end or length > _MAX_COUNT:
                raise IndexError(self._at)
            yield data[start : self._at]

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{layout}", self._data, self._at)
        self._at += struct.calcsize(f"<{layout}")
        return values
