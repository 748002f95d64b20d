"""Models for tests: the default one with another tokenizer."""

import mmap
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from flywheel_server.engines.embedded import default_model
from flywheel_server.engines.gguf import _Reader

ALIGNMENT = 32


def text(value: str) -> bytes:
    """Returns a text as GGUF has it."""
    return struct.pack("<Q", len(value.encode())) + value.encode()


def entry(name: str, value: object) -> bytes:
    """Returns an entry of the metadata as GGUF has it; its value is a text, a number, or a list of them."""
    match value:
        case str():
            packed = struct.pack("<I", 8) + text(value)
        case bool():
            packed = struct.pack("<I?", 7, value)
        case int():
            packed = struct.pack("<Ii", 5, value)
        case [str(), *_]:
            packed = struct.pack("<IIQ", 9, 8, len(value)) + b"".join(text(str(each)) for each in value)
        case [float(), *_]:
            packed = struct.pack(f"<IIQ{len(value)}f", 9, 6, len(value), *value)
        case [*numbers]:
            packed = struct.pack(f"<IIQ{len(numbers)}i", 9, 5, len(numbers), *numbers)
        case _:
            raise TypeError
    return text(name) + packed


def gguf(metadata: Mapping[str, object]) -> bytes:
    """Returns a GGUF file with these values and no tensors."""
    return struct.pack("<4sIQQ", b"GGUF", 3, 0, len(metadata)) + b"".join(map(entry, metadata, metadata.values()))


@contextmanager
def _default_model() -> Iterator[_Reader]:
    with default_model().open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield _Reader(data)


def default_metadata(name: str) -> list[str]:
    """Returns the texts that the default model has in a list under this name."""
    with _default_model() as reader:
        return [each.decode() for each in dict(reader.metadata())[name]]


def write_model(file: Path, changes: Mapping[str, object]) -> None:
    """Writes the default model with other metadata; None takes an entry out."""
    with _default_model() as reader:
        data = reader._data
        entries: dict[str, bytes] = {}
        start = struct.calcsize("<4sIQQ")
        for name, _ in reader.metadata():
            entries[name] = data[start : reader._at]
            start = reader._at
        (tensors,) = struct.unpack_from("<Q", data, 8)
        for _ in range(tensors):
            reader._string()
            (dimensions,) = reader._unpack("I")
            reader._unpack(f"{dimensions}QIQ")
        for name, value in changes.items():
            entries.pop(name, None)
            if value is not None:
                entries[name] = entry(name, value)
        head = struct.pack("<4sIQQ", b"GGUF", 3, tensors, len(entries)) + b"".join(entries.values()) + data[start : reader._at]
        weights = -(-reader._at // ALIGNMENT) * ALIGNMENT
        file.write_bytes(head + bytes(-len(head) % ALIGNMENT) + data[weights:])
