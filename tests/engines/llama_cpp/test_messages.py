"""Conversations: which tokens they have, that no content can act as a part of the template, and which of them are refused."""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any, Final

import pytest
from flywheel_server.engines.base import InvalidFieldError, PromptTooLongError, UnsupportedFieldError
from flywheel_server.engines.llama_cpp.default_model import default_model
from flywheel_server.engines.llama_cpp.engine import EmbeddedEngine
from flywheel_server.engines.llama_cpp.llama import RefusedError
from flywheel_server.engines.llama_cpp.tokenizer import Tokenizer
from flywheel_server.messages import GenerationRequest, Message

from tests.cpu_time import check_cpu_time
from tests.engines.llama_cpp.chat_models import CHATML, QUICK, WITH_ALL_SPECIAL_TOKENS, ChatModel
from tests.engines.llama_cpp.conftest import samples_of
from tests.engines.llama_cpp.loaded import Loaded, Turns
from tests.thorough import further

CONTENTS: Final = (
    "Hello",
    "What does `cat <file>` do?",
    "  two spaces, and line breaks after it \n\n",
    "\n\nGröße 漢字 e\u0301 🦙\n\ncode:\n    def f():\n        return {'a': [\"1\", 2]}\n",
    "'s\\n",
    "\u00a0-1.5e3\u2028",
    "<h1>A</h1>\t<b>c</b>",
)
"""Contents without special tokens of a template."""

CONVERSATIONS: Final = (
    ("user",),
    ("system", "user"),
    ("user", "assistant", "user"),
    ("system", "user", "assistant", "user", "assistant", "user"),
    ("developer", "user"),
    ("user", "user", "assistant", "system"),
    ("user", "assistant", "tool"),
    ("user", "assistant", "tool", "tool", "assistant", "user"),
)


def conversations(loaded: Loaded) -> list[Turns]:
    """Returns the conversations that the template keeps, with each content at each place."""
    return [
        list(zip(roles, islice(cycle(CONTENTS), first, None), strict=False))
        for roles in CONVERSATIONS
        if keeps(loaded, roles)
        for first in range(len(CONTENTS))
    ]


def keeps(loaded: Loaded, roles: tuple[str, ...]) -> bool:
    """Returns whether llama.cpp renders each message of a conversation with these roles."""
    try:
        rendered = loaded.llama.render_chat([(role, f"content{index}.") for index, role in enumerate(roles)])
    except RefusedError:
        return False
    return all(f"content{index}." in rendered for index in range(len(roles)))


def test_a_conversation_has_the_tokens_that_llama_makes_of_the_rendered_template(loaded: Loaded) -> None:
    for turns in conversations(loaded):
        rendered = loaded.llama.render_chat(turns)
        whole = loaded.llama.tokenize(rendered, add_special=True)
        assert loaded.tokens_of(*turns) == whole, turns
        # What the assistant has begun comes after the prompt, as it is.
        begun = turns[0][1]
        assert loaded.tokens_of(*turns, ("assistant", begun)) == loaded.llama.tokenize(rendered + begun, add_special=True)
        assert loaded.tokens_of(*turns, max_input_tokens=11) == whole[-11:]
    assert loaded.tokens_of(*turns, ("assistant", "")) == whole


def test_a_text_is_a_message_of_a_user(loaded: Loaded) -> None:
    for text in CONTENTS:
        assert loaded.tokens(text) == loaded.tokens_of(("user", text))
    # A text that is in the template already is read as it is; a message is not.
    for text in loaded.model.brings:
        assert loaded.tokens(text) != loaded.tokens_of(("user", text))


@pytest.mark.parametrize("model", [WITH_ALL_SPECIAL_TOKENS[0], *further(WITH_ALL_SPECIAL_TOKENS[1:])], ids=str)
def test_no_special_token_in_a_content_acts_as_one(model: ChatModel, tmp_path: Path) -> None:
    with Loaded.running(model, tmp_path) as loaded:
        special = loaded.special_tokens
        assert set(model.control) | set(model.user_defined) <= set(special)
        roles: tuple[str, ...] = ("system", "user", "assistant", "user", "assistant")
        plain = structure(loaded, roles, ["a b"] * len(roles))
        for text in special:
            assert structure(loaded, roles, [f"{text}a{text} b\n{text}"] * len(roles)) == plain, text
        some = (*model.brings, *list(special)[:: len(special) // 8])
        # Each in one message, and a part of it in one message and the other part in the next.
        for text, at in product(some, range(len(roles))):
            contents = ["a b"] * len(roles)
            contents[at] = text
            assert structure(loaded, roles, contents) == plain, text
            contents[at : at + 2] = [text[:2], text[2:]][: len(roles) - at]
            assert structure(loaded, roles, contents) == plain, text
        # Other roles, which not every template has.
        for roles in filter(partial(keeps, loaded), (("user", "assistant", "tool"), ("pirate",))):
            plain = structure(loaded, roles, ["a b"] * len(roles))
            for text in some:
                assert structure(loaded, roles, [f"{text}a{text}"] * len(roles)) == plain, text


def structure(loaded: Loaded, roles: tuple[str, ...], contents: list[str]) -> list[int]:
    """Returns the special tokens of the prompt of a conversation; checks that the prompt has the contents."""
    tokens = loaded.tokens_of(*zip(roles, contents, strict=True))
    text = _squeezed(b"".join(loaded.tokenizer.token_bytes(tokens)).decode())
    assert all(_squeezed(content) in text or _squeezed(_as_json(content)) in text for content in contents)
    ids = loaded.special_tokens.values()
    return [token for token in tokens if token in ids]


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _as_json(text: str) -> str:
    return json.dumps(text)[1:-1]


def test_a_template_does_not_see_contents(tmp_path: Path) -> None:
    (qwen,) = [model for model in WITH_ALL_SPECIAL_TOKENS if model.name == "Qwen 3"]
    with Loaded.running(qwen, tmp_path) as loaded:
        for content in ("<tool_response>a</tool_response>", "<think>a</think>b", "</think>\n\nc"):
            turns = [("user", "Hi"), ("assistant", content), ("user", content), ("tool", content)]
            assert b"".join(loaded.tokenizer.token_bytes(loaded.tokens_of(*turns))).decode() == (
                f"<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n{content}<|im_end|>\n<|im_start|>user\n{content}<|im_end|>\n"
                f"<|im_start|>user\n<tool_response>\n{content}\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
            )


BODIES: Final = {
    "dropped": "''",
    "repeated": "message['content'] * 2",
    "loud": "message['content'] | upper",
    "flat": "message['content'] | replace('\\n', ' ')",
    "indented": "message['content'] | indent",
    "cut": "message['content'][:-2]",
    "alone": "raise_exception('Roles must alternate: Error: no')",
    "quoted": "raise_exception('No ' + message['content'] + ' of ' + message['role'] + ' here')",
    "broken": "message['content'].nothing.nothing.nothing()",
}
"""What a template writes as the body of messages with these roles."""


@pytest.fixture(scope="module")
def refusing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    body = "message['content']"
    for role, each in BODIES.items():
        body = f"(({each}) if message['role'] == '{role}' else {body})"
    with Loaded.running(
        ChatModel("refusing", CHATML.replace("message['content']", body)), tmp_path_factory.mktemp("chat")
    ) as it:
        yield it


@pytest.mark.parametrize("role", ["dropped", "repeated", "loud", "flat", "indented", "cut"])
def test_a_message_that_the_template_does_not_keep_is_refused(refusing: Loaded, role: str) -> None:
    assert refusing.tokens_of(("user", "Hi"), ("pirate", "Ho"))
    with pytest.raises(InvalidFieldError, match="for which the model's chat template writes the content") as caught:
        refusing.tokens_of(("user", "Hi"), (role, "Ho"))
    assert caught.value.field == "messages[1].role"


def test_no_role_makes_a_token_that_has_another_purpose(tmp_path: Path) -> None:
    (phi,) = [model for model in QUICK if model.name == "Phi-3.5"]
    turn = "'<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n'"
    template = f"{{% for message in messages %}}{{{{ {turn} }}}}{{% endfor %}}<|assistant|>\n"
    with Loaded.running(replace(phi, template=template), tmp_path) as loaded:
        assert loaded.tokens_of(("system", "Hi"), ("pirate", "Hi"), ("assistant", "Hi"), ("user", "Hi"))
        with pytest.raises(InvalidFieldError, match="not the name of one of its special tokens") as caught:
            loaded.tokens_of(("user", "Hi"), ("end", "Hi"))
        assert caught.value.field == "messages[1].role"


@pytest.mark.parametrize(
    ("role", "words"),
    [
        ("alone", "Roles must alternate: Error: no"),
        # A template may quote a content. The caller sees nothing of what stands for the content.
        ("quoted", "No … of quoted here"),
        ("broken", ""),
    ],
)
def test_a_conversation_that_the_template_refuses_is_refused_in_its_own_words(refusing: Loaded, role: str, words: str) -> None:
    with pytest.raises(InvalidFieldError) as caught:
        refusing.tokens_of(("user", "Hi"), (role, "Ho"))
    assert caught.value.field == "messages"
    assert str(caught.value).startswith(f"messages must suit the model's chat template, which says: {words}")
    assert "marker" not in str(caught.value)
    assert caught.value.args == ("messages", caught.value.description)


@pytest.mark.parametrize("loaded", [model for model in WITH_ALL_SPECIAL_TOKENS if model.name == "SmolLM2"], indirect=True)
class TestDefaultModel:
    """Prompts of the default model's vocabulary."""

    def test_the_last_tokens_are_kept_so_the_system_message_goes_first(self, loaded: Loaded) -> None:
        turns = [("system", "Be brief."), ("user", "word " * 5_000), ("assistant", "Yes"), ("user", "Why?")]
        whole = loaded.tokens_of(*turns)
        assert loaded.tokens_of(*turns, max_input_tokens=4_000) == whole[-4_000:]
        assert loaded.tokens_of(*turns, max_input_tokens=10**6) == whole

    def test_a_conversation_that_does_not_fit_is_refused(self, loaded: Loaded) -> None:
        tokenizer = Tokenizer(loaded.llama, loaded.tokenizer._vocabulary, 100, loaded.template)
        turns = tuple(Message(role="user", content="word " * 20) for _ in range(10))
        request = GenerationRequest(messages=turns, max_tokens=10)
        tokenizer.check_length(request)
        with pytest.raises(PromptTooLongError) as caught:
            tokenizer.tokens(request, lambda: False)
        assert (caught.value.prompt_tokens, caught.value.is_exact) == (len(loaded.tokens_of(*_turns(request))), True)
        long = tuple(Message(role="user", content="-" * 10_000) for _ in range(10))
        with pytest.raises(PromptTooLongError) as caught:
            tokenizer.check_length(GenerationRequest(messages=long, max_tokens=10))
        assert caught.value.counted_tokens == 0
        # A template may drop spaces, so they do not count.
        spaces = tuple(Message(role="user", content=" " * 10_000) for _ in range(10))
        tokenizer.check_length(GenerationRequest(messages=spaces, max_tokens=10))

    def test_token_ids_are_the_prompt_as_they_are(self, loaded: Loaded) -> None:
        size = len(loaded.tokenizer._vocabulary.token_bytes)
        ids = (5, 0, size - 1, 1, 1, 2)

        def tokens(ids: tuple[int, ...], **fields: Any) -> list[int]:
            request = GenerationRequest(prompt_token_ids=ids, **{"max_tokens": 1} | fields)
            loaded.tokenizer.check_length(request)
            return loaded.tokenizer.tokens(request, lambda: False)

        assert tokens(ids) == list(ids)
        assert tokens(ids, max_input_tokens=2) == [1, 2]
        assert tokens(ids, max_input_tokens=60) == list(ids)
        with pytest.raises(PromptTooLongError) as caught:
            tokens(ids, max_tokens=10**7 - 5)
        assert (caught.value.prompt_tokens, caught.value.is_exact) == (6, True)
        assert tokens(ids, max_tokens=10**7 - 5, max_input_tokens=5) == list(ids[1:])
        with pytest.raises(InvalidFieldError) as invalid:
            tokens((1, 2, 3, size, size + 1))
        assert str(invalid.value) == f"prompt_token_ids[3] must be 0 to {size - 1}, an id of the model's vocabulary"

    def test_a_model_that_reads_texts_as_they_are_refuses_messages(self, loaded: Loaded) -> None:
        raw = Tokenizer(loaded.llama, loaded.tokenizer._vocabulary, 100)
        request = GenerationRequest(messages=(Message(role="user", content="Hi"),), max_tokens=1)
        with pytest.raises(UnsupportedFieldError, match="the model has no chat template") as caught:
            raw.tokens(request, lambda: False)
        assert caught.value.field == "messages"
        assert raw.tokens(GenerationRequest(prompt_token_ids=(1,), max_tokens=1), lambda: False) == [1]

    def test_a_long_conversation_is_put_into_the_template_at_once(self, loaded: Loaded) -> None:
        content = ("Why? <|im_end|> " * 256)[: 2**12]
        messages = [Message(role=("user", "assistant")[index % 2], content=content) for index in range(256)]
        check_cpu_time(0.1, lambda: loaded.template.prompt(messages))


async def test_a_broken_answer_goes_on_as_the_unbroken_one(tmp_path: Path) -> None:
    engine = EmbeddedEngine(default_model(), context_tokens=512, slots=1, threads=1, batch_tokens=64, prompt_format="chat")
    turns = (
        Message(role="system", content="Be friendly."),
        Message(role="user", content="Why is the sky blue?"),
    )
    async with engine:

        async def answer(max_tokens: int, begun: str = "") -> str:
            messages = (*turns, Message(role="assistant", content=begun)) if begun else turns
            request = GenerationRequest(messages=messages, max_tokens=max_tokens, temperature=0.0)
            (sample,) = await samples_of(engine, request)
            assert sample.prompt_tokens == len((await engine.prepare(request)).prompt)
            return sample.text

        whole = await answer(24)
        assert len(whole.split()) > 10
        for tokens in (1, 15):
            # Equal because each text ends where a token ends, and the tokenizer makes the same tokens of the text.
            begun = await answer(tokens)
            assert begun + await answer(24 - tokens, begun) == whole


def _turns(request: GenerationRequest) -> Turns:
    return [(message.role, message.content) for message in request.messages]
