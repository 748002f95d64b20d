"""From the text of a request to the tokens that the model reads, with no more work than the tokens that are kept need."""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from flywheel_server.engines.base import PromptFormat, PromptTooLongError
from flywheel_server.engines.gguf import BETWEEN_WORDS, BPE, Vocabulary
from flywheel_server.engines.llama import Llama
from flywheel_server.messages import GenerationRequest

PIECE: Final = 2**15
"""Characters that are tokenized at a time. After each piece, the prompt may turn out to be too long, or its call to be over.

Also, the time that llama.cpp takes grows with the square of the number of special tokens in a piece.
"""

MARGIN: Final = 2**10
"""Characters before those that are kept, so that what is different at the start of a cut text is not among them."""


class StoppedError(Exception):
    """Nobody wants the tokens any more."""


class Tokenizer:
    """Makes tokens of prompts. Its methods block, and may be called from several threads.

    Arguments:
        llama: The model.
        vocabulary: Its tokens.
        context_tokens: The most tokens of prompt and generated text together.
        prompt_format: Whether a text without special tokens is put into the model's chat template.
    """

    def __init__(self, llama: Llama, vocabulary: Vocabulary, context_tokens: int, prompt_format: PromptFormat) -> None:
        self._llama = llama
        self._vocabulary = vocabulary
        self._context_tokens = context_tokens
        self._prompt_format = prompt_format
        self._special = _pattern(map(re.escape, vocabulary.special_tokens))
        words = [BETWEEN_WORDS.pattern] if vocabulary.can_be_cut else []
        separators = [f"(?={re.escape(text)})" for text in vocabulary.separators]
        # SentencePiece adds a space to the start of a text, which must not be among the tokens that count.
        self._seams = _pattern([*(words if vocabulary.tokenizer == BPE else ()), *separators])
        self._starts_of_ends = _pattern([*words, *separators])

    def check_length(self, request: GenerationRequest) -> None:
        """Raises `PromptTooLongError` for a text that has too many bytes to fit, whichever tokens it is made of.

        A short text is left to `tokens`, which tells exactly how many it has.
        """
        longest = self._vocabulary.max_token_bytes
        if longest is None or len(request.text) <= PIECE or self._keeps_what_fits(request):
            return
        at_least = -(-len(request.text.encode()) // longest)
        if request.max_input_tokens:
            at_least = min(at_least, request.max_input_tokens)
        if at_least > self._room(request):
            raise PromptTooLongError(at_least, request.max_tokens, self._context_tokens, counted_tokens=0)

    def tokens(self, request: GenerationRequest, is_stopped: Callable[[], bool]) -> list[int]:
        """Returns the tokens of the prompt that the model reads.

        Raises `PromptTooLongError`, `StoppedError` soon after `is_stopped` has become true, and what `Llama.tokenize` does.
        """
        prompt = self._rendered(request.text)
        if self._keeps_what_fits(request):
            prompt = self._tail(prompt, request.max_input_tokens)
        tokens: list[int] = []
        pieces = list(self._pieces(prompt))
        for number, piece in enumerate(pieces, 1):
            if is_stopped():
                raise StoppedError
            tokens += self._llama.tokenize(piece, begins_text=number == 1)
            if len(tokens) > self._room(request) and not self._keeps_what_fits(request):
                counted = None if number == len(pieces) else len(tokens)
                kept = len(tokens[-request.max_input_tokens :])
                raise PromptTooLongError(kept, request.max_tokens, self._context_tokens, counted)
        return tokens[-request.max_input_tokens :]

    def _room(self, request: GenerationRequest) -> int:
        return self._context_tokens - request.max_tokens

    def _keeps_what_fits(self, request: GenerationRequest) -> bool:
        return 0 < request.max_input_tokens <= self._room(request)

    def _rendered(self, text: str) -> str:
        """Returns what the model reads: the text in the chat template, unless it brings one."""
        if self._prompt_format == "raw" or (self._special and self._special.search(text)):
            return text
        return self._llama.render_chat(text)

    def _tail(self, prompt: str, tokens: int) -> str:
        """Returns an end of the prompt that has the same last tokens as the whole.

        It is the whole prompt if that is short, or has no place where it can be cut.
        """
        if self._vocabulary.max_token_bytes is None or self._starts_of_ends is None:
            return prompt
        end = len(prompt) - tokens * self._vocabulary.max_token_bytes - MARGIN
        window = PIECE
        while end > 0:
            start = max(end - window, 0)
            if places := [found.start() for found in self._starts_of_ends.finditer(prompt, start, end)]:
                return prompt[places[-1] :]
            if not start:
                break
            window *= 2
        return prompt

    def _pieces(self, prompt: str) -> Iterator[str]:
        """Yields the prompt in pieces that have the same tokens as the whole."""
        start = 0
        while self._seams and (seam := self._seams.search(prompt, start + PIECE)):
            yield prompt[start : seam.start()]
            start = seam.start()
        yield prompt[start:]


def _pattern(alternatives: Iterable[str]) -> re.Pattern[str] | None:
    """Returns the pattern of any of these patterns; None if there are none."""
    joined = "|".join(alternatives)
    return re.compile(joined) if joined else None
