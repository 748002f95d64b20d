"""From the text of a request to the tokens that the model reads, with no more work than the tokens that are kept need."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, groupby
from operator import attrgetter
from typing import Final

from flywheel_server.engines.base import PromptTooLongError
from flywheel_server.engines.llama_cpp.chat_template import ChatTemplate, Fragment
from flywheel_server.engines.llama_cpp.llama import Llama
from flywheel_server.engines.llama_cpp.vocabulary import BETWEEN_WORDS, BPE, Vocabulary
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
        template: What a text is put into that does not bring it; None if texts are read as they are.
    """

    def __init__(self, llama: Llama, vocabulary: Vocabulary, context_tokens: int, template: ChatTemplate | None = None) -> None:
        self._llama = llama
        self._vocabulary = vocabulary
        self._context_tokens = context_tokens
        self._template = template
        self._begin, self._end = _added(llama)
        self._bos = llama.bos_token() if self._begin else ""
        bos = re.escape(self._bos)
        self._leading_bos = re.compile(rf"(?:\s|{bos})*{bos}") if bos else None
        words = [BETWEEN_WORDS.pattern] if vocabulary.can_be_cut else []
        # SentencePiece adds a space to the start of a text, which must not be among the tokens that count.
        inner_words = words if vocabulary.tokenizer == BPE else []
        separators = [f"(?={re.escape(text)})" for text in vocabulary.separators]
        found_always = [f"(?={re.escape(text)})" for text in vocabulary.separators if text in vocabulary.user_defined_tokens]
        # By whether special tokens are such.
        self._seams = {True: _pattern([*inner_words, *separators]), False: _pattern([*inner_words, *found_always])}
        self._starts_of_ends = {True: _pattern([*words, *separators]), False: _pattern([*words, *found_always])}

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
        prompt = self._prompt(request.text)
        end = self._tail(prompt, request.max_input_tokens) if self._keeps_what_fits(request) else prompt
        tokens = self._tokens_of(end, request, is_stopped)
        if len(tokens) < request.max_input_tokens and end != prompt:
            # Some models drop spaces.
            tokens = self._tokens_of(prompt, request, is_stopped)
        return tokens[-request.max_input_tokens :]

    def _tokens_of(self, prompt: Sequence[Fragment], request: GenerationRequest, is_stopped: Callable[[], bool]) -> list[int]:
        tokens: list[int] = []
        characters = 0
        pieces = list(self._pieces(prompt)) or [([], True)]
        for number, (texts, parse_special) in enumerate(pieces, 1):
            if is_stopped():
                raise StoppedError
            tokens += self._llama.tokenize(texts, parse_special=parse_special)
            if number == 1 and tokens[: len(self._begin)] != self._begin:
                tokens[:0] = self._begin
            characters += sum(map(len, texts))
            is_all = number == len(pieces)
            if is_all:
                tokens += self._end
            if (is_all or characters >= PIECE) and len(tokens) > self._room(request) and not self._keeps_what_fits(request):
                counted = None if is_all else len(tokens)
                kept = len(tokens[-request.max_input_tokens :])
                raise PromptTooLongError(kept, request.max_tokens, self._context_tokens, counted)
        return tokens

    def _room(self, request: GenerationRequest) -> int:
        return self._context_tokens - request.max_tokens

    def _keeps_what_fits(self, request: GenerationRequest) -> bool:
        return 0 < request.max_input_tokens <= self._room(request)

    def _prompt(self, text: str) -> Sequence[Fragment]:
        """Returns what the model reads: the text in the chat template, unless it brings one."""
        if self._template is None:
            prompt = [Fragment(text, parse_special=True)]
        elif self._template.is_brought_by(text):
            prompt = [Fragment(text.lstrip(), parse_special=True)]
        else:
            prompt = self._template.prompt(text)
        # The token that begins a text is there once, however often and after which spaces the text brings it.
        if self._leading_bos and prompt and prompt[0].parse_special and (found := self._leading_bos.match(prompt[0].text)):
            prompt[0] = Fragment(self._bos + prompt[0].text[found.end() :], parse_special=True)
        return prompt

    def _tail(self, prompt: Sequence[Fragment], tokens: int) -> Sequence[Fragment]:
        """Returns an end of the prompt that has the same last tokens as the whole.

        It is the whole prompt if that is short, or has no place where it can be cut.
        """
        if self._vocabulary.max_token_bytes is None:
            return prompt
        characters = tokens * self._vocabulary.max_token_bytes + MARGIN
        kept: list[Fragment] = []
        for fragment in reversed(prompt):
            if characters <= 0:
                break
            kept.append(Fragment(self._end_of(fragment, characters), fragment.parse_special))
            characters -= len(fragment.text)
        return kept[::-1]

    def _end_of(self, fragment: Fragment, characters: int) -> str:
        """Returns an end of the fragment of at least so many characters, or all of it."""
        end = len(fragment.text) - characters
        window = PIECE
        while end > 0 and (seams := self._starts_of_ends[fragment.parse_special]):
            start = max(end - window, 0)
            if places := [found.start() for found in seams.finditer(fragment.text, start, end)]:
                return fragment.text[places[-1] :]
            if not start:
                break
            window *= 2
        return fragment.text

    def _pieces(self, prompt: Iterable[Fragment]) -> Iterator[tuple[list[str], bool]]:
        """Yields texts that have the same tokens by themselves as within the prompt, as many at a time as make a piece.

        With them comes whether special tokens are such in them.
        """
        for parse_special, fragments in groupby(prompt, key=attrgetter("parse_special")):
            texts: list[str] = []
            room = PIECE
            for text in chain.from_iterable(map(self._cut, fragments)):
                texts.append(text)
                room -= len(text)
                if room <= 0:
                    yield texts, parse_special
                    texts, room = [], PIECE
            if texts:
                yield texts, parse_special

    def _cut(self, fragment: Fragment) -> Iterator[str]:
        start = 0
        seams = self._seams[fragment.parse_special]
        while seams and (seam := seams.search(fragment.text, start + PIECE)):
            yield fragment.text[start : seam.start()]
            start = seam.start()
        yield fragment.text[start:]


def _added(llama: Llama) -> tuple[list[int], list[int]]:
    """Returns the tokens that the model wants where a text begins, and where it ends."""
    bare, whole = llama.tokenize("a"), llama.tokenize("a", add_special=True)
    start = next((at for at in range(len(whole)) if whole[at : at + len(bare)] == bare), len(whole))
    return whole[:start], whole[start + len(bare) :]


def _pattern(alternatives: Iterable[str]) -> re.Pattern[str] | None:
    """Returns the pattern of any of these patterns; None if there are none."""
    joined = "|".join(alternatives)
    return re.compile(joined) if joined else None
