"""From text to tokens: the tokens do not depend on how the text is cut, and little more text is tokenized than is kept."""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from flywheel_server.engines.base import EngineUnavailableError, PromptTooLongError
from flywheel_server.engines.llama_cpp import tokenizer as tokenizer_module
from flywheel_server.engines.llama_cpp.default_model import default_model
from flywheel_server.engines.llama_cpp.engine import EmbeddedEngine
from flywheel_server.engines.llama_cpp.gguf import NotGgufError, read_metadata
from flywheel_server.engines.llama_cpp.llama import Llama
from flywheel_server.engines.llama_cpp.tokenizer import StoppedError, Tokenizer
from flywheel_server.engines.llama_cpp.vocabulary import Vocabulary
from flywheel_server.messages import GenerationRequest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.engines.llama_cpp.models import default_metadata, gguf, write_model
from tests.serving import until

CONTEXT = 1024
NONE: frozenset[str] = frozenset()

PARTS = st.sampled_from(
    [
        *("a", "word", "Wörter", "漢字", "かな", "한국어", "🦙", "e\u0301", "١٢٣", "42", "x_y", "don't", "I'LL"),
        *(" ", "  ", " " * 9, "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u2028", " \n ", "\n "),
        *(".", "...", "- ", "-" * 40, "=", "();", '"', "“", "$", "\\", "\0", "\ufffd"),
        *("<|im_start|>", "<|im_end|>", "<|im_start|>user\n", "<repo_name>", "<|im", "▁", "Ġ", "<0x0A>"),
    ]
)
TEXTS = st.lists(st.tuples(PARTS, st.integers(1, 12)), min_size=1, max_size=60).map(
    lambda parts: "".join(part * times for part, times in parts)
)


@pytest.fixture(scope="module")
async def engine() -> AsyncIterator[EmbeddedEngine]:
    async with EmbeddedEngine(
        default_model(), context_tokens=CONTEXT, slots=1, threads=1, batch_tokens=16, prompt_format="raw"
    ) as started:
        yield started


class Counting(Llama):
    """Counts the characters that are tokenized."""

    def __init__(self, llama: Llama) -> None:
        self.__dict__ = dict(llama.__dict__)
        self.characters = self.longest = 0

    def tokenize(self, text: str | Sequence[str | int], *, add_special: bool = False, parse_special: bool = True) -> list[int]:
        for each in [text] if isinstance(text, str) else map(str, text):
            self.characters += len(each)
            self.longest = max(self.longest, len(each))
        return super().tokenize(text, add_special=add_special, parse_special=parse_special)

    def close(self) -> None:
        """Does nothing: the fixture closes the model."""


def tokenizer_of(engine: EmbeddedEngine, llama: Llama | None = None, context_tokens: int = 10**6) -> Tokenizer:
    tokenizer = Tokenizer(llama or engine._llama, engine._file.vocabulary, context_tokens)
    if isinstance(llama, Counting):
        llama.characters = llama.longest = 0
    return tokenizer


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS, piece=st.integers(1, 40), kept=st.integers(1, 30))
def test_the_tokens_are_those_of_the_whole_text(engine: EmbeddedEngine, text: str, piece: int, kept: int) -> None:
    whole = engine._llama.tokenize(text, add_special=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "CHUNK_CHARACTERS", piece)
        patch.setattr(tokenizer_module, "MARGIN_CHARACTERS", 1)
        tokenizer = tokenizer_of(engine)
        assert tokenizer.tokens(GenerationRequest(text=text, max_tokens=1), lambda: False) == whole
        request = GenerationRequest(text=text * 20, max_tokens=1, max_input_tokens=kept)
        assert tokenizer.tokens(request, lambda: False) == engine._llama.tokenize(text * 20, add_special=True)[-kept:]


def with_tokens(*pairs: tuple[str, str]) -> dict[str, object]:
    """Returns metadata of the default model in which each of these pairs is one token."""
    tokens, merges = (default_metadata(f"tokenizer.ggml.{name}") for name in ("tokens", "merges"))
    new = [left + right for left, right in pairs if left + right not in tokens]
    tokens[40_000 : 40_000 + len(new)] = new
    return {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": [*map(" ".join, pairs), *merges]}


def sentencepiece(*words: str) -> dict[str, object]:
    """Returns the metadata of a tokenizer that takes the whole text at once, with these tokens and few others."""
    bytes_of_text = [f"<0x{byte:02X}>" for byte in range(256)]
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    tokens = ["<unk>", "<s>", "</s>", *bytes_of_text, "▁", *letters, *words]
    unused = [f"<unused{number}>" for number in range(len(tokens), 49_152)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": None,
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.tokens": tokens + unused,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259) + [5] * len(unused),
        "tokenizer.ggml.scores": [float(len(token)) for token in tokens + unused],
    }


@pytest.mark.parametrize(
    ("changes", "joint"),
    [
        # Words and punctuation with the line break after them.
        ({"tokenizer.ggml.pre": "qwen2"} | with_tokens(("_", "Ċ")), "x_\ny "),
        # Words of scripts that the tokenizer does not know, and tokens of several words.
        ({"tokenizer.ggml.pre": "deepseek-llm"} | with_tokens(("Ø", "§"), ("Ø§", "Ġ")), "\u0627 1 "),
        ({"tokenizer.ggml.pre": "superbpe"} | with_tokens(("a", "Ġa")), "a a"),
        # A token at the end of each text.
        ({"tokenizer.ggml.add_eos_token": True}, "a a"),
        (sentencepiece("▁a", "▁b"), "a b "),
        (sentencepiece("▁a", "▁b"), "a <s>b</s>"),
        (sentencepiece("▁a", "a▁", "▁a▁", "▁a▁a"), "a a "),
    ],
    ids=[
        "underscore",
        "other script",
        "several words",
        "end of text",
        "sentencepiece",
        "special",
        "sentencepiece, several words",
    ],
)
def test_the_tokens_are_those_of_the_whole_text_with_any_tokenizer(
    tmp_path: Path, changes: dict[str, object], joint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model.gguf"
    write_model(model, changes)
    llama = Llama(model, context_tokens=64, slots=1, threads=1, batch_tokens=32)
    monkeypatch.setattr(tokenizer_module, "MARGIN_CHARACTERS", 1)
    monkeypatch.setattr(tokenizer_module, "CHUNK_CHARACTERS", 7)
    try:
        tokenizer = Tokenizer(llama, Vocabulary.of(read_metadata(model)[0]), 10**6)
        for text in (joint * 100, ("ab " + joint) * 100, (joint + "\n") * 100):
            whole = llama.tokenize(text, add_special=True)
            assert tokenizer.tokens(GenerationRequest(text=text, max_tokens=1), lambda: False) == whole
            for kept in (1, 2, 3, 4, 5, 8, 13, 21, 29):
                request = GenerationRequest(text=text, max_tokens=1, max_input_tokens=kept)
                assert tokenizer.tokens(request, lambda: False) == whole[-kept:]
    finally:
        llama.close()
        model.unlink()


def test_special_tokens_are_not_tokenized_all_at_once(engine: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    # For 80,000 special tokens at once, which are 1 MiB, llama.cpp needs more than two minutes.
    counting = Counting(engine._llama)
    tokenizer = tokenizer_of(engine, counting)
    monkeypatch.setattr(tokenizer_module, "CHUNK_CHARACTERS", 2**10)
    text = "<|im_start|>a" * 1000
    assert tokenizer.tokens(GenerationRequest(text=text, max_tokens=1), lambda: False) == [1, 81] * 1000
    assert counting.longest < tokenizer_module.CHUNK_CHARACTERS + len("<|im_start|>a")
    counting.characters = 0
    request = GenerationRequest(text=text, max_tokens=1, max_input_tokens=3)
    assert tokenizer.tokens(request, lambda: False) == [81, 1, 81]
    assert counting.characters < 3 * 81 + tokenizer_module.MARGIN_CHARACTERS + 30


def test_only_the_end_of_a_long_text_is_tokenized_if_only_the_end_is_kept(engine: EmbeddedEngine) -> None:
    chance = random.Random(1)
    text = " ".join("".join(chance.choices("abcdefgh", k=chance.randrange(1, 9))) for _ in range(100_000))
    counting = Counting(engine._llama)
    request = GenerationRequest(text=text, max_tokens=1, max_input_tokens=20)
    tokens = tokenizer_of(engine, counting).tokens(request, lambda: False)
    assert tokens == engine._llama.tokenize(text, add_special=True)[-20:]
    longest = engine._file.vocabulary.max_token_bytes or 0
    assert 20 * longest <= counting.characters < 20 * longest + tokenizer_module.MARGIN_CHARACTERS + 20


async def test_a_text_that_cannot_fit_is_refused_by_its_bytes(engine: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def unasked(*_: object, **__: object) -> list[int]:
        raise AssertionError("it is tokenized")

    longest = engine._file.vocabulary.max_token_bytes or 0
    room = CONTEXT - 24
    with monkeypatch.context() as patch:
        # Patches the class: older versions of pytest would leave the method in the instance.
        patch.setattr(Llama, "tokenize", unasked)
        with pytest.raises(PromptTooLongError) as caught:
            await engine.prepare(GenerationRequest(text="-" * (room * longest + 1), max_tokens=24))
        error = caught.value
        assert (error.prompt_tokens, error.is_exact, error.counted_tokens) == (room + 1, False, 0)
        # The error reports no more tokens than `max_input_tokens`.
        with pytest.raises(PromptTooLongError) as caught:
            await engine.prepare(GenerationRequest(text="-" * 200_000, max_tokens=24, max_input_tokens=room + 1))
        assert caught.value.prompt_tokens == room + 1
    # A token has up to 64 dashes. By its bytes, this text may fit, and it does.
    prepared = await engine.prepare(GenerationRequest(text="-" * (64 * room), max_tokens=24))
    assert len(prepared.prompt) == room


def test_a_text_of_words_that_does_not_fit_is_given_up_early(engine: EmbeddedEngine) -> None:
    counting = Counting(engine._llama)
    with pytest.raises(PromptTooLongError) as caught:
        tokenizer_of(engine, counting, 9000).tokens(GenerationRequest(text="word " * 200_000, max_tokens=1), lambda: False)
    assert counting.characters < 3 * tokenizer_module.CHUNK_CHARACTERS
    assert 9000 <= caught.value.prompt_tokens == caught.value.counted_tokens < 20_000
    assert not caught.value.is_exact


def test_tokenizing_stops_after_a_chunk_if_the_call_has_ended(engine: EmbeddedEngine) -> None:
    counting = Counting(engine._llama)
    with pytest.raises(StoppedError):
        tokenizer_of(engine, counting).tokens(
            GenerationRequest(text="word " * 200_000, max_tokens=1), lambda: counting.characters > 0
        )
    assert counting.characters < 2 * tokenizer_module.CHUNK_CHARACTERS


async def test_stopping_the_engine_does_not_wait_for_whole_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces: list[str] = []
    engine = EmbeddedEngine(default_model(), context_tokens=8192, slots=1, threads=1, batch_tokens=16, prompt_format="raw")
    async with engine:
        tokenize = engine._llama.tokenize

        def noting(texts: Sequence[str], *, parse_special: bool) -> list[int]:
            pieces.extend(texts)
            return tokenize(texts, parse_special=parse_special)[:1]

        monkeypatch.setattr(engine._llama, "tokenize", noting)
        reading = asyncio.ensure_future(engine.prepare(GenerationRequest(text="word " * 100_000, max_tokens=1)))
        await until(lambda: bool(pieces), "the prompt is being read")
    with pytest.raises(EngineUnavailableError):
        await reading
    assert len(pieces) < 10


@pytest.mark.parametrize(
    ("kind", "tokens", "types", "expected"),
    [
        # Byte-pair encoding writes each byte as a character: the second token is three bytes of text.
        (
            "gpt2",
            ["<s>", "ĠĊé", "ab", ")Ċ", "_Ċ", "Ġa"],
            [3, 1, 1, 1, 1, 1],
            Vocabulary("gpt2", (), 3, ("<s>",), NONE, True, ("<s>",)),
        ),
        (
            "llama",
            ["<unk>", "</s>", "▁▁", "ab"],
            [2, 3, 1, 1],
            Vocabulary("llama", (), 6, ("<unk>", "</s>"), NONE, True, ("<unk>", "</s>")),
        ),
        # Tokens that contain the space or the line break between two words, in several scripts.
        (
            "gpt2",
            ["a", "<|a b|>"],
            [1, 4],
            Vocabulary("gpt2", (), 7, ("<|a b|>",), frozenset({"<|a b|>"}), False, ("<|a b|>",)),
        ),
        ("gpt2", ["a", "ofĠthe"], [1, 1], Vocabulary("gpt2", (), 6, (), NONE, False, ())),
        ("gpt2", ["a", "éĊ"], [1, 1], Vocabulary("gpt2", (), 2, (), NONE, True, ())),
        ("gpt2", ["a", "Ã©Ċ"], [1, 1], Vocabulary("gpt2", (), 3, (), NONE, False, ())),
        ("llama", ["a", "▁of▁the"], [1, 1], Vocabulary("llama", (), 11, (), NONE, False, ())),
        ("llama", ["a", "f\n"], [1, 4], Vocabulary("llama", (), 2, ("f\n",), frozenset({"f\n"}), False, ("f\n",))),
        # Only the first and the last token are separators: the others overlap another token or are part of one.
        (
            "llama",
            ["<s>", "{ab", "bc}", "}}", "▁{", "[x]"],
            [3, 4, 4, 4, 4, 3],
            Vocabulary(
                "llama",
                (),
                4,
                ("<s>", "{ab", "bc}", "}}", "▁{", "[x]"),
                frozenset({"{ab", "bc}", "}}", "▁{"}),
                True,
                ("<s>", "[x]"),
            ),
        ),
        # A tokenizer that makes one token of an unknown word, however long the word is.
        ("bert", ["[UNK]", "ab"], [2, 1], Vocabulary("bert", (), None, ("[UNK]",), NONE, False, ())),
    ],
)
def test_the_vocabulary_of_a_file(tmp_path: Path, kind: str, tokens: list[str], types: list[int], expected: Vocabulary) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(
        gguf(
            {
                "general": 1,
                "tokenizer.ggml.model": kind,
                "tokenizer.ggml.tokens": tokens,
                "numbers": [1, 2],
                "tokenizer.ggml.token_type": types,
            }
        )
    )
    assert replace(Vocabulary.of(read_metadata(file)[0]), token_bytes=()) == expected
    for length in (0, 3, 40, file.stat().st_size - 5):
        broken = tmp_path / "broken.gguf"
        broken.write_bytes(file.read_bytes()[:length])
        with pytest.raises(NotGgufError):
            read_metadata(broken)


def test_the_vocabulary_of_the_default_model(engine: EmbeddedEngine) -> None:
    assert engine._file.vocabulary.tokenizer == "gpt2"
    assert engine._file.vocabulary.max_token_bytes == 81
    assert "<|im_start|>" in engine._file.vocabulary.special_tokens
