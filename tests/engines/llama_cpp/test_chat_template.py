"""Chat templates: which texts are put into them, with which tokens, and that no text can act as a part of one."""

from datetime import datetime
from pathlib import Path
from typing import Final

import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.engines.llama_cpp import tokenizer as tokenizer_module
from flywheel_server.engines.llama_cpp.engine import EmbeddedEngine
from flywheel_server.engines.llama_cpp.tokenizer import Tokenizer
from flywheel_server.messages import GenerationRequest
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tests.engines.llama_cpp.chat_models import QUICK, WITH_BOS
from tests.engines.llama_cpp.loaded import Loaded
from tests.serving import serving

ORDINARY: Final = (
    "Hello",
    "What does `cat <file>` do?",
    "  two spaces, and line breaks after it \n\n",
    "Größe 漢字 e\u0301 🦙\n\ncode:\n    def f():\n        return {'a': [1, 2]}\n",
    "\n",
    "'s",
    "-1.5e3",
    "<h1>A</h1>\t<b>c</b>",
    "word " * 7_000,
)
"""Texts without special tokens of a template."""

NO_TEMPLATES: Final = (
    "What does `cat <filename>` do?",
    "<repo_name>x",
    "<filename>a.py",
    "<issue_start> is a token of which model?",
    "What is <|im_end|> for?",
    "Why do people write [INST] and [/INST]?",
    "username: <|im_start|>user",
    "Explain <|start_header_id|>user<|end_header_id|>, <start_of_turn>user, <｜User｜> and <s>",
    "### Summary:\nHi",
    "",
)


def rendered_by_jinja(template: str, text: str, bos: str, eos: str) -> str:
    """Returns the text in the template as the hub's library transformers renders it, in its `utils/chat_template_utils.py`."""

    def raise_exception(message: str) -> None:
        raise AssertionError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)  # noqa: DTZ005 - as in transformers
    return environment.from_string(template).render(
        messages=[{"role": "user", "content": text}], bos_token=bos, eos_token=eos, add_generation_prompt=True
    )


def test_the_rendering_is_that_of_the_hub(loaded: Loaded) -> None:
    bos, eos = loaded.llama.bos_token(), loaded.llama._request("GET", "/props")["eos_token"]
    for text in ORDINARY:
        expected = rendered_by_jinja(loaded.llama.chat_template(), text, bos, eos)
        # llama.cpp leaves out a token that it adds to each text.
        assert loaded.rendered(text).removeprefix(bos) == expected.removeprefix(bos)


def test_a_prompt_has_the_tokens_that_llama_makes_of_the_rendered_template(loaded: Loaded) -> None:
    for text in ORDINARY:
        whole = loaded.llama.tokenize(loaded.rendered(text), add_special=True)
        assert loaded.tokens(text) == whole
        for kept in (1, 5, 40):
            assert loaded.tokens(text, max_input_tokens=kept) == whole[-kept:]


def test_a_text_is_put_into_the_template_unless_it_begins_as_the_template_does(loaded: Loaded) -> None:
    for text in NO_TEMPLATES:
        assert not loaded.template.is_applied_to(text), text
    for text in loaded.model.brings:
        assert loaded.template.is_applied_to(text), text
        assert not loaded.template.is_applied_to(f"What is {text}"), text
        whole = loaded.llama.tokenize(text.lstrip().removeprefix(loaded.model.bos), add_special=True)
        assert loaded.tokens(text) == whole


def test_a_text_cannot_act_as_a_part_of_the_template(loaded: Loaded) -> None:
    plain = loaded.counted(loaded.tokens("a b"))
    parts = [*loaded.model.control, *loaded.model.user_defined, *loaded.model.brings, "<|im_end|>", "<|end|>", "</s>", "<s>"]
    parts = [part for part in parts if part not in {"<h1>", "\n\n"}]
    for text in [*(f"a {part} b" for part in parts), *(f"a{part}" for part in parts), " ".join(["a", *parts * 50])]:
        assert not loaded.template.is_applied_to(text)
        tokens = loaded.tokens(text)
        assert {**loaded.counted(tokens), "<h1>": 0} == {**plain, "<h1>": 0}, text
        # The tokens still make up the text.
        pieces = loaded.llama._request("POST", "/detokenize", {"tokens": tokens})["content"]
        assert "".join(text.split()) in "".join(pieces.split())


def test_a_part_of_a_special_token_does_not_join_the_template_beside_it(loaded: Loaded) -> None:
    plain = loaded.counted(loaded.tokens("a b"))
    for token in (*loaded.model.control, *loaded.model.user_defined):
        if len(token) > 2:
            for text in (token[1:], token[:-1], token[1:] + token[:-1]):
                assert {**loaded.counted(loaded.tokens(text)), "<h1>": 0} == {**plain, "<h1>": 0}, text


@pytest.mark.parametrize("loaded", WITH_BOS, indirect=True, ids=str)
def test_bos_begins_a_prompt_once(loaded: Loaded) -> None:
    bos = loaded.model.bos
    (begin,) = loaded.llama.tokenize(bos)
    raw = Tokenizer(loaded.llama, loaded.tokenizer._vocabulary, 10**7)
    texts = ["Hi", bos, f"{bos}Hi", f" \n{bos}Hi", f"{bos}{bos}Hi", f"{bos} {bos}\n{bos}", f"{bos}{'word ' * 7_000}"]
    for text in texts:
        tokens = raw.tokens(GenerationRequest(text=text, max_tokens=1), lambda: False)
        assert (tokens[0], tokens.count(begin)) == (begin, 1)
        kept = raw.tokens(GenerationRequest(text=text, max_tokens=1, max_input_tokens=len(tokens)), lambda: False)
        assert kept == tokens
        last = raw.tokens(GenerationRequest(text=text, max_tokens=1, max_input_tokens=1), lambda: False)
        assert last == tokens[-1:]
    plain = loaded.tokens("a").count(begin)
    for text in ("Hi", f"Hi {bos}", *NO_TEMPLATES[:4]):
        tokens = loaded.tokens(text)
        assert (tokens[0], tokens.count(begin)) == (begin, plain)
    for text in loaded.model.brings:
        tokens = loaded.tokens(text)
        assert tokens[0] == begin
        assert tokens[1] != begin
        assert loaded.tokens(bos + text.lstrip().removeprefix(bos)) == tokens
        if plain == 1:
            assert loaded.tokens(f"{bos}{bos} {bos}" + text.lstrip().removeprefix(bos)) == tokens


def test_a_text_full_of_special_tokens_is_cut_too(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = [*loaded.model.control, *loaded.model.user_defined, "<|im_end|>"]
    text = "a" + "".join(f"{token}a b " for token in tokens) * 40
    whole = loaded.tokens(text)
    monkeypatch.setattr(tokenizer_module, "CHUNK_CHARACTERS", 50)
    monkeypatch.setattr(tokenizer_module, "MARGIN_CHARACTERS", 1)
    assert loaded.tokens(text) == whole
    for kept in (1, 3, 20):
        assert loaded.tokens(text, max_input_tokens=kept) == whole[-kept:]


async def test_callers_bring_the_template_or_leave_it_to_the_model(tmp_path: Path) -> None:
    (mixtral,) = [model for model in QUICK if model.name == "Mixtral"]
    mixtral.write(file := tmp_path / "model.gguf")
    engine = EmbeddedEngine(file, context_tokens=256, slots=1, threads=1, batch_tokens=16, prompt_format=None)
    async with serving(engine) as target:

        async def prompt_tokens(text: str) -> int:
            return int((await target.stub.GenerateAll(pb.GenerationRequest(text=text, max_tokens=1))).prompt_tokens)

        assert (await target.stub.GetModel(pb.GetModelRequest())).prompt_format == "chat"
        bare = await prompt_tokens("Why?")
        assert bare == await prompt_tokens("[INST] Why? [/INST]") == await prompt_tokens("<s>[INST] Why? [/INST]")
        assert await prompt_tokens("Why [INST] Why? [/INST]?") > bare + 5
