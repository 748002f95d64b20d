"""Chat models that run, for the tests of prompts."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from flywheel_server.engines.llama_cpp.chat_template import ChatTemplate
from flywheel_server.engines.llama_cpp.llama import Llama
from flywheel_server.engines.llama_cpp.model_file import ModelFile
from flywheel_server.engines.llama_cpp.tokenizer import Tokenizer
from flywheel_server.messages import GenerationRequest, Message

from tests.engines.llama_cpp.chat_models import ChatModel

Turns = Sequence[tuple[str, str]]
"""Messages, each a role and a content."""


@dataclass
class Loaded:
    """A model that runs."""

    model: ChatModel
    llama: Llama
    template: ChatTemplate
    tokenizer: Tokenizer

    @classmethod
    @contextmanager
    def running(cls, model: ChatModel, folder: Path) -> Iterator[Self]:
        """Runs the model, whose file is in the folder for a moment."""
        model.write(file := folder / "model.gguf")
        llama = Llama(file, context_tokens=64, slots=1, threads=1, batch_tokens=16)
        vocabulary = ModelFile.read(file).vocabulary
        file.unlink()
        template = ChatTemplate(llama, vocabulary)
        yield cls(model, llama, template, Tokenizer(llama, vocabulary, 10**7, template))
        llama.close()

    def tokens(self, text: str, **fields: Any) -> list[int]:
        """Returns the tokens of the prompt of a request with a text."""
        return self.tokenizer.tokens(GenerationRequest(text=text, max_tokens=1, **fields), lambda: False)

    def tokens_of(self, *turns: tuple[str, str], **fields: Any) -> list[int]:
        """Returns the tokens of the prompt of a request with messages."""
        messages = tuple(Message(role=role, content=content) for role, content in turns)
        return self.tokenizer.tokens(GenerationRequest(messages=messages, max_tokens=1, **fields), lambda: False)

    def rendered(self, text: str) -> str:
        """Returns the text in the chat template, as llama.cpp renders it."""
        return self.llama.render_chat([("user", text)])

    def counted(self, tokens: list[int]) -> dict[str, int]:
        """Returns how often each token of the template is among the tokens."""
        known = ("<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|end|>", "<s>", "</s>", "<unk>")
        found = {text: self.llama.tokenize(text) for text in {*self.model.control, *self.model.user_defined, *known}}
        return {text: tokens.count(ids[0]) for text, ids in found.items() if len(ids) == 1 and not text.isspace()}

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Returns the texts and ids of the tokens that llama.cpp parses within other texts."""
        vocabulary = self.tokenizer._vocabulary
        found: dict[str, int] = {}
        for text in vocabulary.special_tokens:
            parsed = self.llama.tokenize(text)
            is_control = parsed != self.llama.tokenize(text, parse_special=False)
            if len(parsed) == 1 and not text.isspace() and (is_control or text in vocabulary.user_defined_tokens):
                found[text] = parsed[0]
        return found
