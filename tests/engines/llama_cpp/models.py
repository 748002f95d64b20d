"""Models for tests: the default one with other metadata, and small ones with random weights and a real vocabulary."""

import math
import mmap
import random
import struct
from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from flywheel_server.engines.llama_cpp.default_model import default_model
from flywheel_server.engines.llama_cpp.gguf import _Reader

ALIGNMENT = 32

WIDTH = 32


def text(value: str) -> bytes:
    """Returns a text in the format of GGUF."""
    return struct.pack("<Q", len(value.encode())) + value.encode()


def entry(name: str, value: object) -> bytes:
    """Returns an entry of the metadata in the format of GGUF. The value is a text, a number, or a list of them."""
    match value:
        case str():
            packed = struct.pack("<I", 8) + text(value)
        case bool():
            packed = struct.pack("<I?", 7, value)
        case int():
            packed = struct.pack("<II", 4, value)
        case float():
            packed = struct.pack("<If", 6, value)
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
def _metadata_of(model: Path) -> Iterator[_Reader]:
    with model.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield _Reader(data)


def _entries(reader: _Reader) -> dict[str, bytes]:
    """Returns the entries of the metadata as they are in the file."""
    entries: dict[str, bytes] = {}
    start = struct.calcsize("<4sIQQ")
    for name, _ in reader.metadata():
        entries[name] = reader._data[start : reader._at]
        start = reader._at
    return entries


def default_metadata(name: str) -> list[str]:
    """Returns the texts that the default model has in a list under this name."""
    with _metadata_of(default_model()) as reader:
        return [each.decode() for each in dict(reader.metadata())[name]]


def _with_changes(entries: Mapping[str, bytes], changes: Mapping[str, object]) -> dict[str, bytes]:
    changed = {name: entry(name, value) for name, value in changes.items() if value is not None}
    return {name: packed for name, packed in entries.items() if name not in changes} | changed


def write_model(file: Path, changes: Mapping[str, object]) -> None:
    """Writes the default model with other metadata. The value None removes an entry."""
    with _metadata_of(default_model()) as reader:
        data = reader._data
        entries = _entries(reader)
        start = reader._at
        for _ in range(reader.tensors):
            reader._string()
            (dimensions,) = reader._unpack("I")
            reader._unpack(f"{dimensions}QIQ")
        entries = _with_changes(entries, changes)
        head = struct.pack("<4sIQQ", b"GGUF", 3, reader.tensors, len(entries))
        head += b"".join(entries.values()) + data[start : reader._at]
        weights = -(-reader._at // ALIGNMENT) * ALIGNMENT
        file.write_bytes(head + bytes(-len(head) % ALIGNMENT) + data[weights:])


def write_small_model(file: Path, changes: Mapping[str, object], vocabulary: Path | None = None) -> None:
    """Writes a model of one layer with random weights, and the vocabulary and chat template of another model.

    Arguments:
        file: The file.
        changes: Metadata that differ. The value None removes an entry.
        vocabulary: The GGUF file with the vocabulary and the chat template; by default, the default model.
    """
    with _metadata_of(vocabulary or default_model()) as reader:
        entries = {name: packed for name, packed in _entries(reader).items() if name.startswith("tokenizer.")}
    architecture: dict[str, object] = {
        "general.architecture": "llama",
        "llama.context_length": 2048,
        "llama.embedding_length": WIDTH,
        "llama.block_count": 1,
        "llama.feed_forward_length": WIDTH,
        "llama.attention.head_count": 1,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }
    entries = _with_changes(entries, architecture | dict(changes))
    (tokens,) = struct.unpack_from("<Q", entries["tokenizer.ggml.tokens"], 8 + len("tokenizer.ggml.tokens") + 8)
    layer = {
        "attn_norm": (WIDTH,),
        "ffn_norm": (WIDTH,),
        **dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"), (WIDTH, WIDTH)),
    }
    shapes = {f"blk.0.{name}.weight": shape for name, shape in layer.items()}
    shapes |= {"output_norm.weight": (WIDTH,), "token_embd.weight": (WIDTH, tokens)}
    infos = data = b""
    for name, shape in shapes.items():
        infos += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, len(data))
        data += _numbers(math.prod(shape))
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(shapes), len(entries)) + b"".join(entries.values()) + infos
    file.write_bytes(head + bytes(-len(head) % ALIGNMENT) + data)


def _numbers(count: int) -> bytes:
    """Returns random weights, which repeat. The number of bytes is a multiple of the alignment."""
    chance = random.Random(count)
    block = array("f", (chance.gauss(0, 0.1) for _ in range(WIDTH * 61))).tobytes()
    return (block * (-(-count * 4 // len(block))))[: count * 4]
