"""Lists the weights and the GPUs that a deployment can use, and checks whether weights fit a GPU.

Sizes are in bytes. Weights take as many bytes of memory as their file has, because llama.cpp keeps them unchanged.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

GIB: Final = 2**30

GPU_OVERHEAD_BYTES: Final = GIB
"""Memory of a GPU that is needed for neither weights nor KV cache.

An estimate: about 0.4 GiB for the CUDA context with the kernels of llama.cpp and cuBLAS; 0.2 GiB for the buffers of a step of
512 tokens of Mixtral, mostly outputs of its experts; the rest for llama.cpp's pool of temporary memory, and for differences
between cards. 1 GiB is also the margin that llama.cpp itself keeps when it fits a model to a GPU.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """A GGUF file on the Hugging Face hub.

    Attributes:
        name: The name in this catalogue.
        repository: The repository on the hub.
        file: The file in it.
        revision: The commit; None for the newest, if the exact size at a commit is not known.
        size_bytes: The maximum size of the file: exact if there is a revision, else the model card's number rounded up.
        layers: Layers that have a KV cache.
        kv_heads: Heads of keys and values in a layer.
        head_dim: Numbers in a key, and in a value, of one head.
    """

    name: str
    repository: str
    file: str
    revision: str | None
    size_bytes: int
    layers: int
    kv_heads: int
    head_dim: int

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of KV cache for a token: a key and a value in each layer, in fp16, which is llama.cpp's default."""
        return self.layers * self.kv_heads * self.head_dim * 2 * 2

    def path(self, directory: Path) -> Path:
        """Returns the path of the file in a directory of weights. Each revision has a path of its own."""
        return directory / self.repository / (self.revision or "main") / self.file


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU that Modal rents.

    Attributes:
        name: Modal's name for it.
        memory_gib: GiB that CUDA offers a process.
        architecture: CUDA's number of the architecture that kernels are compiled for, such as 86.
    """

    name: str
    memory_gib: float
    architecture: int


# All are licensed under Apache-2.0. Mixtral and Mistral were trained for 32768 tokens of context, SmolLM2 for 8192.
#
# Mixtral's experts must be one tensor per layer. The well-known files of TheBloke (Q3_K_M: 20.36 GB) have one tensor per
# expert, which llama.cpp has refused since November 2024 (its issue 10244). In the supported format, Q3_K_M has 22.55 GB,
# too much for 24 GB cards, and Q3_K_S has 20.43 GB.
WEIGHTS: Final[Mapping[str, Weights]] = {
    weights.name: weights
    for weights in (
        Weights(
            name="mixtral-8x7b-instruct-q3_k_s",
            repository="tensorblock/Mixtral-8x7B-Instruct-v0.1-GGUF",
            file="Mixtral-8x7B-Instruct-v0.1-Q3_K_S.gguf",
            revision=None,
            size_bytes=20_434_000_000,
            layers=32,
            kv_heads=8,
            head_dim=128,
        ),
        Weights(
            name="mixtral-8x7b-instruct-q4_k_m",
            repository="mradermacher/Mixtral-8x7B-Instruct-v0.1-i1-GGUF",
            file="Mixtral-8x7B-Instruct-v0.1.i1-Q4_K_M.gguf",
            revision="0e8d21e9cc0d28b59173d329348f60f8628d1c05",
            size_bytes=28_448_468_608,
            layers=32,
            kv_heads=8,
            head_dim=128,
        ),
        Weights(
            name="mistral-7b-instruct-q8_0",
            repository="bartowski/Mistral-7B-Instruct-v0.3-GGUF",
            file="Mistral-7B-Instruct-v0.3-Q8_0.gguf",
            revision="61fd4167fff3ab01ee1cfe0da183fa27a944db48",
            size_bytes=7_702_565_088,
            layers=32,
            kv_heads=8,
            head_dim=128,
        ),
        Weights(
            name="smollm2-135m-instruct-q8_0",
            repository="bartowski/SmolLM2-135M-Instruct-GGUF",
            file="SmolLM2-135M-Instruct-Q8_0.gguf",
            revision="09816acd5d99df7be770d85ea30822623dab342c",
            size_bytes=144_811_360,
            layers=30,
            kv_heads=3,
            head_dim=64,
        ),
    )
}

DEFAULT_WEIGHTS: Final = "mixtral-8x7b-instruct-q3_k_s"

# The cheapest first. The memory is the smallest total that CUDA programs have reported for the GPU ("GPU 0 has a total capacity
# of …"), rounded down. It is less than nvidia-smi reports, and much less than the card's nominal size: the A10 of 24 GB has
# 23028 MiB on Modal (pull request 2797 of modal-client). CUDA offers 22.06 GiB of it there, and 21.99 GiB on other machines.
GPUS: Final[Mapping[str, Gpu]] = {
    gpu.name: gpu
    for gpu in (
        Gpu("T4", 14.5, 75),
        Gpu("L4", 21.9, 89),
        Gpu("A10", 21.9, 86),
        Gpu("L40S", 44.3, 89),
        Gpu("A100-40GB", 39.3, 80),
        Gpu("A100-80GB", 79.1, 80),
        Gpu("RTX-PRO-6000", 94.9, 120),
        Gpu("H100", 79.1, 90),
        Gpu("H200", 139.8, 90),
        Gpu("B200", 178.3, 100),
    )
}

# For names with which Modal may assign one of several GPUs (A100, H100, B200+), the smallest of them counts.
ALIASES: Final[Mapping[str, str]] = {"A10G": "A10", "A100": "A100-40GB", "H100!": "H100", "B200+": "B200"}


class DoesNotFitError(ValueError):
    """Weights and context need more memory than the GPU has. The message has the calculation, and says what would fit."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """How the memory of a GPU is used. `str` returns it as a table.

    Attributes:
        weights: The weights that are loaded.
        gpu: Modal's name of the GPU, with ":n" for n of them; None for the CPU, whose memory the deployment chooses.
        context_tokens: Tokens of context that all samples share.
        memory_bytes: The memory that CUDA offers on all GPUs together; 0 without a GPU.
        overhead_bytes: Memory reserved for buffers and for CUDA itself.
    """

    weights: Weights
    gpu: str | None
    context_tokens: int
    memory_bytes: int
    overhead_bytes: int

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV cache for the whole context."""
        return self.context_tokens * self.weights.kv_bytes_per_token

    @property
    def free_bytes(self) -> int:
        """Bytes that stay free; negative if bytes are missing."""
        return self.memory_bytes - self.weights.size_bytes - self.kv_bytes - self.overhead_bytes

    @property
    def max_context_tokens(self) -> int:
        """The largest context that fits, in tokens; 0 if the weights alone do not fit."""
        return max(0, self.context_tokens + self.free_bytes // self.weights.kv_bytes_per_token)

    def __str__(self) -> str:
        weights = self.weights
        if self.gpu is None:
            return f"{weights.name} on the CPU with {self.context_tokens} tokens of context: not checked"
        per_token = weights.kv_bytes_per_token / 1024
        rows = (
            (f"memory of {self.gpu}", self.memory_bytes, ""),
            ("weights", -weights.size_bytes, weights.name),
            ("KV cache", -self.kv_bytes, f"{self.context_tokens} tokens x {per_token:g} KiB"),
            ("buffers and CUDA", -self.overhead_bytes, ""),
            ("left" if self.free_bytes >= 0 else "missing", abs(self.free_bytes), ""),
        )
        width = max(len(what) for what, *_ in rows)
        return "\n".join(f"  {what:{width}} {size / GIB:8.2f} GiB  {note}".rstrip() for what, size, note in rows)


def find(name: str) -> Weights:
    """Returns the weights of that name. Raises `ValueError` with the known names if there are none."""
    try:
        return WEIGHTS[name]
    except KeyError:
        raise ValueError(f"Unknown weights {name!r}. Known: {', '.join(WEIGHTS)}.") from None


def find_gpu(gpu: str) -> tuple[Gpu, int]:
    """Returns the GPU that Modal assigns for "name" or "name:count", and the count. Raises `ValueError` if it is unknown."""
    name, colon, count = gpu.upper().partition(":")
    known = GPUS.get(ALIASES.get(name, name))
    if known is None or (colon and not re.fullmatch("[1-9][0-9]*", count)):
        raise ValueError(f"Unknown GPU {gpu!r}. Known: {', '.join([*GPUS, *ALIASES])}, each also as NAME:COUNT; or none.")
    return known, int(count or 1)


def check_fit(weights: Weights, gpu: str | None, context_tokens: int) -> MemoryPlan:
    """Returns how the memory of the GPU is used. Raises `DoesNotFitError`, and `ValueError` if the GPU is unknown.

    The memory of several GPUs is added up. llama.cpp puts whole layers on each GPU, so with several GPUs leave the size of a
    layer free.

    Arguments:
        weights: The weights to serve.
        gpu: Modal's name of the GPU, such as "A10G" or "A10G:2". None or "" for the CPU, on which everything fits.
        context_tokens: Tokens of context that all samples share.
    """
    if not gpu:
        return MemoryPlan(weights, None, context_tokens, 0, 0)
    fit = _plan(weights, gpu, context_tokens)
    if fit.free_bytes >= 0:
        return fit
    fitting = [name for name in GPUS if _plan(weights, name, context_tokens).free_bytes >= 0]
    raise DoesNotFitError(
        f"{weights.name} with {context_tokens} tokens of context does not fit {gpu}:\n{fit}\n"
        f"It fits {', '.join(fitting) if fitting else 'no single GPU'}"
        + (f", and {gpu} fits it with at most {fit.max_context_tokens} tokens." if fit.max_context_tokens else ".")
    )


def _plan(weights: Weights, name: str, context_tokens: int) -> MemoryPlan:
    gpu, count = find_gpu(name)
    return MemoryPlan(weights, name, context_tokens, count * int(gpu.memory_gib * GIB), count * GPU_OVERHEAD_BYTES)
