"""Small models with random weights that have the vocabulary and the chat template of real ones."""

import lzma
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from flywheel_server.engines.llama_cpp.gguf import read_metadata

from tests.engines.llama_cpp.models import default_metadata, write_small_model
from tests.thorough import further

HERE: Final = Path(__file__).parent

CONTROL: Final = 3
USER_DEFINED: Final = 4

CHATML: Final = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class ChatModel:
    """A model for tests.

    Attributes:
        name: The name of the model.
        template: The chat template; None for the chat template of the default model.
        is_sentencepiece: Whether the model has the vocabulary of Phi-3. If not, it has the vocabulary of the default model.
        bos: The token that the model adds to the start of each text (BOS); empty if the model adds none.
        control: Special tokens that are added to the vocabulary.
        user_defined: Tokens that are added to the vocabulary, and that llama.cpp parses in every text.
        brings: Texts that are in the chat template already.
    """

    name: str
    template: str | None
    is_sentencepiece: bool = False
    bos: str = ""
    control: tuple[str, ...] = ()
    user_defined: tuple[str, ...] = ()
    brings: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name

    def write(self, file: Path) -> None:
        """Writes the model."""
        changes: dict[str, object] = {"general.name": self.name}
        if self.template is not None:
            changes["tokenizer.chat_template"] = self.template
        if self.is_sentencepiece:
            vocabulary = file.with_suffix(".vocabulary")
            vocabulary.write_bytes(lzma.decompress((HERE / "vocabularies" / "phi-3.gguf.xz").read_bytes()))
            tokens, types = texts_of(vocabulary), numbers_of(vocabulary)
        else:
            vocabulary = None
            tokens, types = default_metadata("tokenizer.ggml.tokens"), [3] * 17 + [1] * (49_152 - 17)
        place = 30_000
        for kind, texts in ((CONTROL, self.control), (USER_DEFINED, self.user_defined)):
            for text in texts:
                tokens[place], types[place] = text, kind
                place += 1
        changes |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
        changes["tokenizer.ggml.add_bos_token"] = bool(self.bos)
        if self.bos:
            changes["tokenizer.ggml.bos_token_id"] = tokens.index(self.bos)
        write_small_model(file, changes, vocabulary)


def texts_of(vocabulary: Path) -> list[str]:
    """Returns the tokens of a vocabulary."""
    return [token.decode() for token in read_metadata(vocabulary)[0]["tokenizer.ggml.tokens"]]


def numbers_of(vocabulary: Path) -> list[int]:
    """Returns the types of the tokens of a vocabulary."""
    return list(read_metadata(vocabulary)[0]["tokenizer.ggml.token_type"])


def _template(name: str) -> str:
    return (HERE / "templates" / f"{name}.jinja").read_text()


_LLAMA_3_TOKENS: Final = (
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|python_tag|>",
)
_CHATML_TURNS: Final = (
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>system\nYou are a pirate.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "\n <|im_start|>user\nHi<|im_end|>\n",
)

QUICK: Final = (
    ChatModel("SmolLM2", None, brings=_CHATML_TURNS),
    ChatModel(
        "Phi-3.5",
        _template("microsoft-Phi-3.5-mini-instruct"),
        is_sentencepiece=True,
        bos="<s>",
        brings=(
            "<|user|>\nHi<|end|>\n<|assistant|>\n",
            "<s><|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n",
            "<|user|> Hi<|end|>",
        ),
    ),
    ChatModel(
        "Mixtral",
        _template("mistralai-Mixtral-8x7B-Instruct-v0.1"),
        is_sentencepiece=True,
        bos="<s>",
        brings=(
            "[INST] Hi [/INST]",
            "<s>[INST] Hi [/INST]",
            "<s> [INST] Hi [/INST] Ho</s>[INST] Hum [/INST]",
            " [INST]Hi[/INST]",
        ),
    ),
    ChatModel(
        "DeepSeek-R1",
        _template("deepseek-ai-DeepSeek-R1-Distill-Llama-8B"),
        bos="<｜begin▁of▁sentence｜>",
        control=("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        user_defined=("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
        brings=(
            "<｜User｜>Hi<｜Assistant｜>",
            "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜><think>\n",
            "<｜begin▁of▁sentence｜>You are a pirate.<｜User｜>Hi<｜Assistant｜>",
        ),
    ),
)
THOROUGH: Final = (
    ChatModel("ChatML", CHATML, brings=_CHATML_TURNS),
    ChatModel(
        "ChatML whose first token begins a text",
        CHATML,
        bos="<|im_start|>",
        brings=_CHATML_TURNS,
    ),
    ChatModel(
        "Llama 2",
        _template("meta-llama-Llama-2-7b-chat-hf"),
        is_sentencepiece=True,
        bos="<s>",
        brings=("[INST] Hi [/INST]", "<s>[INST] <<SYS>>\nYou are a pirate.\n<</SYS>>\n\nHi [/INST]"),
    ),
    ChatModel(
        "Gemma 2",
        _template("google-gemma-2-2b-it"),
        is_sentencepiece=True,
        bos="<s>",
        control=("<start_of_turn>", "<end_of_turn>"),
        user_defined=("<h1>", "\n\n"),
        brings=("<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n", "<s><start_of_turn>user\nHi<end_of_turn>\n"),
    ),
    ChatModel(
        "Llama 3.2",
        _template("meta-llama-Llama-3.2-3B-Instruct"),
        bos="<|begin_of_text|>",
        control=_LLAMA_3_TOKENS,
        brings=(
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>",
            "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nYou are a pirate.<|eot_id|>",
        ),
    ),
    ChatModel(
        "Qwen 3",
        _template("Qwen-Qwen3-0.6B"),
        user_defined=("<think>", "</think>", "<tool_call>", "</tool_call>"),
        brings=_CHATML_TURNS,
    ),
    ChatModel(
        "Mistral Nemo",
        _template("mistralai-Mistral-Nemo-Instruct-2407"),
        bos="<s>",
        control=("<s>", "</s>", "[INST]", "[/INST]"),
        brings=("[INST]Hi[/INST]", "<s>[INST] Hi [/INST]"),
    ),
    ChatModel(
        "a template that begins with the message", "{% for message in messages %}{{ message['content'] }}\n{% endfor %}>"
    ),
    ChatModel(
        "a template of words",
        "{% for message in messages %}{% if message['role'] == 'user' %}### Instruction:\n{{ message['content'] }}\n\n"
        "{% else %}### Response:\n{{ message['content'] }}\n\n{% endif %}{% endfor %}### Response:\n",
        brings=("### Instruction:\nHi\n\n### Response:\n",),
    ),
)

# A list with all models begins with `WITH_BOS`, so that they have the same indexes in both lists. Pytest then loads each once.
WITH_BOS: Final = [*(model for model in QUICK if model.bos), *further(model for model in THOROUGH if model.bos)]
WITHOUT_BOS: Final = [*(model for model in QUICK if not model.bos), *further(model for model in THOROUGH if not model.bos)]

_BY_NAME: Final = {model.name: model for model in (*QUICK, *THOROUGH)}

WITH_ALL_SPECIAL_TOKENS: Final = (
    _BY_NAME["SmolLM2"],
    replace(
        _BY_NAME["Llama 3.2"],
        control=(
            *_LLAMA_3_TOKENS,
            "<|end_of_text|>",
            "<|finetune_right_pad_id|>",
            *(f"<|reserved_special_token_{number}|>" for number in range(248)),
        ),
    ),
    replace(
        _BY_NAME["Qwen 3"],
        # The vocabulary of the default model has <|endoftext|>, <|im_start|> and <|im_end|>.
        control=tuple(
            f"<|{name}|>"
            for name in (
                *("object_ref_start", "object_ref_end", "box_start", "box_end", "quad_start", "quad_end", "vision_start"),
                *("vision_end", "vision_pad", "image_pad", "video_pad", "fim_prefix", "fim_middle", "fim_suffix", "fim_pad"),
                *("repo_name", "file_sep"),
            )
        ),
        user_defined=("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
    ),
    replace(
        _BY_NAME["Mistral Nemo"],
        name="Mistral 7B 0.3",
        is_sentencepiece=True,
        control=(
            *("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
            *("[/TOOL_RESULTS]", "[IMG]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
            *(f"[control_{number}]" for number in range(8, 100)),
        ),
        user_defined=("[REF]", "[/REF]", *(f"[REFERENCE_DOC_{number}]" for number in range(20))),
    ),
)
"""Models with all special tokens of the real ones, or with the first hundred of the 771 of Mistral 7B."""
