"""Checks a model's file before llama.cpp loads it. The metadata tell what the model has, or why it cannot generate text."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from flywheel_server.engines.llama_cpp.gguf import Metadata, NotGgufError, read_metadata
from flywheel_server.engines.llama_cpp.vocabulary import MODEL, TOKENS, TYPES, Vocabulary
from flywheel_server.int32 import INT32_MAX

MAX_LAYERS: Final = 512
MAX_EXPERTS: Final = 1024
MIN_ALIGNMENT: Final = 16
_ROPE_SCALING: Final = frozenset({"none", "linear", "yarn", "longrope"})
"""Limits that llama.cpp asserts: it ends the process if a model violates one."""

_TEMPLATE: Final = "tokenizer.chat_template"

_EMBEDDING: Final = re.compile(r".*bert.*|gemma-embedding.*|t5encoder|llama-embed")
_OTHER_ARCHITECTURES: Final = {
    "t5": "an encoder-decoder model",
    **dict.fromkeys(("dream", "llada", "llada-moe", "rnd1"), "a diffusion model"),
    **dict.fromkeys(("eagle3", "dflash", "gemma4-assistant"), "a draft model for speculative decoding"),
    "wavtokenizer-dec": "an audio codec",
}
"""Architectures that llama.cpp loads, but that do not continue a text token by token."""

_RANK_POOLING: Final = 4
"""The type of pooling of rerankers, which score how well a text answers a question."""


class UnusableModelError(Exception):
    """The file is no model that continues a text. The error's text says why, and follows the name of the file."""


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A GGUF file with a model that continues texts.

    Attributes:
        vocabulary_size: The number of tokens in the vocabulary: token ids are below it.
        has_chat_template: Whether the file has a chat template that llama.cpp uses.
        named_templates: The names of the file's other chat templates.
        total_bytes: The size of the file, with all its parts.
    """

    vocabulary: Vocabulary
    vocabulary_size: int
    has_chat_template: bool
    named_templates: tuple[str, ...]
    total_bytes: int

    @classmethod
    def read(cls, path: Path) -> Self:
        """Reads and checks the file; raises `UnusableModelError`."""
        try:
            if path.is_dir():
                raise UnusableModelError("is a directory; name the GGUF file in it")
            if not path.exists():
                raise UnusableModelError("does not exist; --model (FLYWHEEL_MODEL) must name a GGUF file")
            if not path.is_file():
                raise UnusableModelError("is not a regular file")
            metadata, tensors = read_metadata(path)
            _check_kind(metadata)
            _check_architecture(metadata, _text(metadata, "general.architecture"))
            _check_vocabulary(metadata)
            if not tensors:
                raise UnusableModelError("has a vocabulary but no weights")
            total_bytes = sum(part.stat().st_size for part in _parts(path, metadata))
        except OSError as error:
            raise UnusableModelError(f"cannot be read: {error.strerror}") from error
        except NotGgufError as error:
            raise UnusableModelError(f"is not a GGUF model: {error}") from error
        prefix = f"{_TEMPLATE}."
        names = tuple(name.removeprefix(prefix) for name, text in metadata.items() if name.startswith(prefix) and text)
        # Without a default template, llama.cpp uses the template for tools.
        has_chat_template = bool(metadata.get(_TEMPLATE)) or "tool_use" in names
        return cls(Vocabulary.of(metadata), len(metadata[TOKENS]), has_chat_template, names, total_bytes)


def _check_kind(metadata: Metadata) -> None:
    kind = _text(metadata, "general.type")
    architecture = _text(metadata, "general.architecture")
    if kind == "adapter":
        raise UnusableModelError("is a LoRA adapter, not a model; merge it into its base model")
    if kind == "mmproj" or architecture == "clip":
        raise UnusableModelError("is the part of a model that reads images or audio (mmproj); name the language model")
    if kind == "imatrix" or architecture == "imatrix":
        raise UnusableModelError("is an importance matrix for quantizing, not a model")
    parts, number = _count(metadata, "split.count"), _count(metadata, "split.no")
    if parts > 1 and number:
        raise UnusableModelError(f"is part {number + 1} of {parts} of a model; name the first part")
    if not architecture:
        raise UnusableModelError("does not say which architecture the model has (general.architecture)")


def _check_architecture(metadata: Metadata, architecture: str) -> None:
    pooling = metadata.get(f"{architecture}.pooling_type")
    if pooling == _RANK_POOLING or f"{architecture}.classifier.output_labels" in metadata:
        raise UnusableModelError("is a reranker, which scores texts and does not generate any")
    if pooling or _EMBEDDING.fullmatch(architecture):
        raise UnusableModelError(f"is an embedding model ({architecture}); an embedding model does not generate text")
    if other := _OTHER_ARCHITECTURES.get(architecture):
        raise UnusableModelError(f"is {other} ({architecture}), which cannot continue a text by itself")
    if metadata.get(f"{architecture}.attention.causal") is False:
        raise UnusableModelError("is a model whose attention is not causal, which cannot continue a text")
    _check_numbers(metadata, architecture)
    scaling = _text(metadata, f"{architecture}.rope.scaling.type")
    if scaling and scaling not in _ROPE_SCALING:
        raise UnusableModelError(f"is damaged, or newer than this llama.cpp: {architecture}.rope.scaling.type is {scaling}")


def _check_vocabulary(metadata: Metadata) -> None:
    tokens = metadata.get(TOKENS)
    if _text(metadata, MODEL) in {"", "none", "no_vocab"} or not tokens:
        raise UnusableModelError("has no vocabulary; convert the model again, with its tokenizer")
    if not isinstance(tokens, list) or not isinstance(metadata.get(TYPES, ()), tuple):
        raise UnusableModelError("is damaged: its vocabulary is not a list of texts and one of their types")
    # llama.cpp reads a text up to the first NUL, ignores empty texts, and then asserts that all texts differ.
    texts = [text for token in tokens if (text := token.partition(b"\0")[0])]
    if len(set(texts)) < len(texts):
        raise UnusableModelError("is damaged: two tokens of its vocabulary have the same text")


def _check_numbers(metadata: Metadata, architecture: str) -> None:
    """Raises `UnusableModelError` for a number out of range, for which llama.cpp would end the process."""
    experts, used = f"{architecture}.expert_count", f"{architecture}.expert_used_count"
    ranges: dict[str, tuple[float, float]] = {
        f"{architecture}.block_count": (1, MAX_LAYERS),
        f"{architecture}.context_length": (1, INT32_MAX),
        experts: (0, MAX_EXPERTS),
        used: (min(_count(metadata, experts), 1), _count(metadata, experts)),
        f"{architecture}.attention.layer_norm_epsilon": (0, math.inf),
        f"{architecture}.attention.layer_norm_rms_epsilon": (0, math.inf),
        "general.alignment": (MIN_ALIGNMENT, INT32_MAX),
    }
    for key, (least, most) in ranges.items():
        value = metadata.get(key, 0 if key == used else least)
        # llama.cpp itself reports a value that is no number.
        if isinstance(value, int | float) and not least <= value <= most:
            raise UnusableModelError(f"is damaged: {key} is {value}")


def _count(metadata: Metadata, name: str) -> int:
    value = metadata.get(name, 0)
    if not isinstance(value, int):
        raise UnusableModelError(f"is damaged: {name} is not a whole number")
    return value


def _parts(path: Path, metadata: Metadata) -> Iterator[Path]:
    """Yields the files of a model, of which `path` is the first or the only one."""
    count = _count(metadata, "split.count")
    if count <= 1:
        yield path
        return
    prefix = path.name.removesuffix(f"-00001-of-{count:05}.gguf")
    if prefix == path.name:
        raise UnusableModelError(
            f"is the first of {count} parts, and must be called NAME-00001-of-{count:05}.gguf to find the others"
        )
    for number in range(1, count + 1):
        part = path.with_name(f"{prefix}-{number:05}-of-{count:05}.gguf")
        if not part.is_file():
            raise UnusableModelError(f"is the first of {count} parts, and {part.name} is missing beside it")
        yield part


def _text(metadata: Metadata, name: str) -> str:
    value = metadata.get(name, b"")
    return value.decode(errors="replace") if isinstance(value, bytes) else ""
