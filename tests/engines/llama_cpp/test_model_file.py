"""Files that are no model which generates text: the error says what each file is, and the process goes on."""

import errno
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import structlog.testing
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.engines.base import EngineUnavailableError, PromptFormat
from flywheel_server.engines.llama_cpp import engine as embedded_module
from flywheel_server.engines.llama_cpp.engine import EmbeddedEngine
from flywheel_server.engines.llama_cpp.load_failure import load_failure
from flywheel_server.settings import parse

from tests.engines.llama_cpp.models import entry, gguf, text, write_small_model
from tests.serving import serving
from tests.thorough import further

TEMPLATE: Final = "tokenizer.chat_template"
NO_TEMPLATE: Final = {TEMPLATE: None}

TOKENS: Final = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a", "b"]}

PLAIN: Final = "{% for message in messages %}{{ message.content }}{% endfor %}"

TOKENS_: Final[dict[str, Any]] = {name.replace(".", "__"): value for name, value in TOKENS.items()}


def engine_of(model: Path, prompt_format: PromptFormat | None = None) -> EmbeddedEngine:
    return EmbeddedEngine(model, context_tokens=256, slots=1, threads=1, batch_tokens=16, prompt_format=prompt_format)


async def refusal(model: Path, prompt_format: PromptFormat | None = None) -> str:
    """Returns why an engine does not start with the model."""
    with pytest.raises(EngineUnavailableError) as caught:
        async with engine_of(model, prompt_format):
            pass
    return str(caught.value)


def small(**changes: object) -> Callable[[Path], object]:
    """Returns a function that writes a small model with other metadata. `__` in a name stands for a dot."""
    return lambda file: write_small_model(file, {name.replace("__", "."): value for name, value in changes.items()})


def metadata_only(**values: object) -> Callable[[Path], object]:
    named = {name.replace("__", "."): value for name, value in values.items()}
    return lambda file: file.write_bytes(gguf(named))


def content(data: bytes) -> Callable[[Path], object]:
    return lambda file: file.write_bytes(data)


def truncated(file: Path) -> None:
    write_small_model(file, {})
    os.truncate(file, file.stat().st_size // 2)


def first_of_two(file: Path) -> None:
    write_small_model(file, {"split.count": 2, "split.no": 0, "split.tensors.count": 20})


def old_version(file: Path) -> None:
    write_small_model(file, {})
    with file.open("r+b") as opened:
        opened.seek(4)
        opened.write(struct.pack("<I", 1))


def of_architecture(name: str, **values: object) -> Callable[[Path], object]:
    return metadata_only(general__architecture=name, **TOKENS_, **{f"{name}__{key}": value for key, value in values.items()})


def of_tokens(tokens: list[Any], **values: object) -> Callable[[Path], object]:
    return metadata_only(general__architecture="llama", tokenizer__ggml__model="gpt2", tokenizer__ggml__tokens=tokens, **values)


HEAD: Final = struct.pack("<4sIQQ", b"GGUF", 3, 1, 1) + text("x")
LISTS_IN_LISTS: Final = HEAD + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000


def endless(layout: str, *values: int) -> Callable[[Path], object]:
    """Returns a function that writes a file with a single value, which is far larger than the memory."""

    def write(file: Path) -> None:
        file.write_bytes(HEAD + struct.pack(f"<{layout}", *values))
        os.truncate(file, 2**37)

    return write


WRONG: Final[dict[str, tuple[str, Callable[[Path], object], str]]] = {
    "empty": ("m.gguf", content(b""), "is not a GGUF model: it is empty"),
    "a directory": ("m.gguf", Path.mkdir, "is a directory; name the GGUF file in it"),
    "missing": ("m.gguf", lambda _: None, "does not exist"),
    "a pipe": ("m.gguf", os.mkfifo, "is not a regular file"),
    "text": ("m.gguf", content(b"hello, I am no model"), "does not begin as a GGUF file does"),
    "a pointer": ("m.gguf", content(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d"), "git lfs pull"),
    "big-endian": ("m.gguf", content(b"GGUF\0\0\0\3" + bytes(40)), "big-endian"),
    "the first bytes": ("m.gguf", content(gguf(TOKENS)[:60]), "end early"),
    "an adapter": ("m.gguf", metadata_only(general__type="adapter", general__architecture="llama"), "is a LoRA adapter"),
    "mmproj": ("m.gguf", metadata_only(general__type="mmproj", general__architecture="clip"), "mmproj"),
    "clip": ("m.gguf", metadata_only(general__architecture="clip"), "mmproj"),
    "imatrix": ("m.gguf", metadata_only(general__type="imatrix"), "importance matrix"),
    "no architecture": ("m.gguf", metadata_only(**TOKENS_), "general.architecture"),
    "no vocabulary": ("m.gguf", metadata_only(general__architecture="llama"), "has no vocabulary"),
    "a vocabulary only": ("m.gguf", of_architecture("llama"), "has a vocabulary but no weights"),
    "no layers": ("m.gguf", of_architecture("llama", block_count=0), "is damaged: llama.block_count is 0"),
    "too many layers": ("m.gguf", of_architecture("llama", block_count=100_000), "is damaged: llama.block_count is 100000"),
    "no context": ("m.gguf", of_architecture("llama", context_length=0), "is damaged: llama.context_length is 0"),
    "too many experts": ("m.gguf", of_architecture("llama", expert_count=10**6), "is damaged: llama.expert_count is 1000000"),
    "too few experts": (
        "m.gguf",
        of_architecture("llama", expert_count=4, expert_used_count=9),
        "is damaged: llama.expert_used_count is 9",
    ),
    "scaling": ("m.gguf", of_architecture("llama", rope__scaling__type="nonesuch"), "llama.rope.scaling.type is nonesuch"),
    "experts of which none is used": (
        "m.gguf",
        of_architecture("llama", expert_count=4),
        "is damaged: llama.expert_used_count is 0",
    ),
    "a text for a number of experts": (
        "m.gguf",
        of_architecture("llama", expert_count="x"),
        "is damaged: llama.expert_count is not a whole number",
    ),
    "negative epsilon": ("m.gguf", of_architecture("llama", attention__layer_norm_rms_epsilon=-1.0), "epsilon is -1.0"),
    "epsilon": ("m.gguf", of_architecture("llama", attention__layer_norm_epsilon=float("nan")), "epsilon is nan"),
    "alignment": (
        "m.gguf",
        metadata_only(general__architecture="llama", general__alignment=8),
        "is damaged: general.alignment is 8",
    ),
    "a text for a number of parts": ("m.gguf", metadata_only(split__count="x"), "split.count is not a whole number"),
    "lists for a number of parts": ("m.gguf", metadata_only(split__count=[1, 2]), "split.count is not a whole number"),
    "numbers for tokens": ("m.gguf", of_tokens([1, 2]), "is damaged: its vocabulary is not a list of texts"),
    "a number for types": ("m.gguf", of_tokens(["a"], tokenizer__ggml__token_type=3), "and one of their types"),
    "equal tokens": ("m.gguf", of_tokens(["a", "", "b", "", "a"]), "two tokens of its vocabulary have the same text"),
    "equal tokens to a NUL": ("m.gguf", of_tokens(["a", "b", "a\0b"]), "two tokens of its vocabulary have the same text"),
    "a name twice": (
        "m.gguf",
        content(struct.pack("<4sIQQ", b"GGUF", 3, 1, 2**40) + entry("x", 1) * 2 + bytes(10**6)),
        "is not a GGUF model: it has x twice",
    ),
    "lists in lists": ("m.gguf", content(LISTS_IN_LISTS), "its metadata are damaged"),
    **{
        f"endless {kind}": ("m.gguf", endless(layout, *values), "its metadata are damaged")
        for kind, layout, *values in (("text", "IQ", 8, 2**36), ("bytes", "IIQ", 9, 0, 2**36), ("texts", "IIQ", 9, 8, 2**36))
    },
    "embedding": ("m.gguf", of_architecture("qwen3", pooling_type=3), "an embedding model does not generate text"),
    "reranker": ("m.gguf", of_architecture("qwen3", pooling_type=4), "is a reranker"),
    "not causal": ("m.gguf", of_architecture("llama", attention__causal=False), "not causal"),
    "second part": ("m-00002-of-00003.gguf", metadata_only(split__count=3, split__no=1), "is part 2 of 3 of a model"),
    "missing part": ("m-00001-of-00002.gguf", first_of_two, "m-00002-of-00002.gguf is missing beside it"),
    "renamed part": ("m.gguf", first_of_two, "must be called NAME-00001-of-00002.gguf"),
    "truncated": ("m.gguf", truncated, "corrupted or incomplete"),
    "version 1": ("m.gguf", old_version, "GGUFv1 is no longer supported"),
    "little context": ("m.gguf", small(llama__context_length=3), "in a context of 3, and the model was trained for no longer"),
    "much template": (
        "m.gguf",
        small(tokenizer__chat_template="x " * 300 + PLAIN),
        "in a context of 256; raise --embedded-con",
    ),
    "unknown": ("m.gguf", small(general__architecture="frobnicator"), "unknown model architecture: 'frobnicator'"),
    **{
        architecture: ("m.gguf", of_architecture(architecture), said)
        for said, architectures in (
            ("an embedding model does not generate text", ("bert", "nomic-bert", "jina-bert-v2", "modern-bert", "t5encoder")),
            ("is an encoder-decoder model", ("t5",)),
            ("is a diffusion model", ("dream", "llada")),
            ("is a draft model", ("eagle3",)),
            ("is an audio codec", ("wavtokenizer-dec",)),
        )
        for architecture in architectures
    },
}


@pytest.mark.parametrize("case", WRONG)
async def test_the_error_says_why_a_file_cannot_be_used(case: str, tmp_path: Path) -> None:
    name, write, expected = WRONG[case]
    file = tmp_path / name
    write(file)
    said = await refusal(file)
    assert expected in said
    assert str(file) in said


async def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.gguf"
    file.touch()

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    # Root may read every file.
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        said = await refusal(file)
    assert "cannot be read: Permission denied" in said


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (
            [
                "ggml_backend_cpu_buffer_type_alloc_buffer: failed to allocate buffer of size 51539607552",
                "llama_init_from_model: failed to initialize the context: failed to allocate buffer for kv cache",
                "cmn  common_init_: failed to create context with model 'm.gguf'",
            ],
            "there is not enough memory for the model and its context (failed to allocate buffer of size 51539607552)",
        ),
        (
            ["llama_init_from_model: failed to initialize the context: std::bad_alloc"],
            "there is not enough memory for the model and its context (std::bad_alloc)",
        ),
        (["srv init: failed to initialize HTTP server"], "failed to initialize HTTP server"),
        ([], "its log says more"),
    ],
)
def test_the_error_has_the_reason_from_llamas_log(lines: list[str], expected: str) -> None:
    said = load_failure(Path("m.gguf"), lines)
    assert said.startswith("llama.cpp cannot load m.gguf: ")
    assert expected in said


async def test_a_model_larger_than_the_memory_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.gguf"
    write_small_model(file, {})
    monkeypatch.setattr(embedded_module, "total_memory", lambda: 1000)
    with structlog.testing.capture_logs() as logged:
        async with engine_of(file):
            pass
    (warning,) = [entry for entry in logged if entry["log_level"] == "warning"]
    assert (warning["model_bytes"], warning["memory_bytes"]) == (file.stat().st_size, 1000)


UNUSABLE: Final = {
    "syntax": ("{% for message in messages %}{{ message.content", "Parser Error"),
    "raises": ("{{ raise_exception('it needs a list of tools') }}", "it needs a list of tools"),
    "unknown filter": ("{{ messages | frobnicate }}", "frobnicate"),
    "no message": ("{% if messages %}<|im_start|>assistant\n{% endif %}", "leaves out the message of the user"),
    "upper case": ("<|im_start|>{{ messages[-1].content | upper }}<|im_end|>", "or changes it"),
    "no users": (
        "{{ raise_exception('only humans') if messages | selectattr('role', 'equalto', 'user') | list }}",
        "only humans",
    ),
}


@pytest.mark.parametrize("case", ["raises", *further(["syntax", "no message", "upper case", "unknown filter", "no users"])])
async def test_an_unusable_template_is_an_error_for_chat_only(case: str, tmp_path: Path) -> None:
    template, reason = UNUSABLE[case]
    file = tmp_path / "model.gguf"
    write_small_model(file, {TEMPLATE: template})
    for prompt_format in (None, "chat"):
        said = await refusal(file, prompt_format)
        assert f"the chat template of {file} cannot be used" in said
        assert reason in said
        assert "--embedded-prompt raw" in said
        assert "FLYWHEEL_MODAL_PROMPT" in said
    async with engine_of(file, "raw") as engine:
        await engine.check()
        assert engine.model().prompt_format == "raw"


def given(**settings: str) -> PromptFormat | None:
    """Returns the prompt format of an embedded engine with these settings."""
    chosen = parse([f"--{name}={value}" for name, value in settings.items()]).embedded_prompt
    return None if chosen == "auto" else chosen


@pytest.mark.parametrize(
    ("changes", "prompt_format", "told", "log_has"),
    [
        ({}, None, "chat", "chat"),
        (NO_TEMPLATE, None, "raw", "no chat template; prompts are read as they are"),
        pytest.param({TEMPLATE: ""}, None, "raw", "no chat template; prompts are read as they are", marks=pytest.mark.thorough),
        (NO_TEMPLATE, "chat", "chat", "no chat template; prompts are put into ChatML"),
        pytest.param({}, "raw", "raw", "raw", marks=pytest.mark.thorough),
        (NO_TEMPLATE | {f"{TEMPLATE}.rag": "{{ messages[0].content }}"}, None, "raw", "rag"),
        pytest.param(
            NO_TEMPLATE | {f"{TEMPLATE}.tool_use": "Q: {{ messages[0].content }} A:"},
            None,
            "chat",
            "chat",
            marks=pytest.mark.thorough,
        ),
    ],
    ids=["template", "none", "empty", "none, chat", "template, raw", "named", "for tools"],
)
async def test_a_model_without_a_template_reads_prompts_as_they_are_unless_told_otherwise(
    tmp_path: Path, changes: dict[str, object], prompt_format: PromptFormat | None, told: str, log_has: str
) -> None:
    file = tmp_path / "model.gguf"
    write_small_model(file, changes)
    with structlog.testing.capture_logs() as logged:
        engine = engine_of(file, prompt_format)
        async with serving(engine) as target:
            assert (await target.stub.GetModel(pb.GetModelRequest())).prompt_format == told
            (answer,) = (await target.stub.GenerateAll(pb.GenerationRequest(text="Hi", max_tokens=1))).responses
    # "Hi" is one token.
    assert (answer.prompt_tokens > 1) == (told == "chat")
    assert log_has in str(logged)
    assert {"prompt_format": told} in [
        {"prompt_format": entry["prompt_format"]} for entry in logged if entry["event"] == "model loaded"
    ]


def test_the_model_decides_by_default() -> None:
    assert given() is None
    assert given(**{"embedded-prompt": "raw"}) == "raw"
    assert given(**{"embedded-prompt": "chat"}) == "chat"
