"""Makes the tokens that the model reads from the prompt of a request, and tokenizes little more of the prompt than is kept."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from typing import Final

from flywheel_server.engines.base import InvalidFieldError, PromptTooLongError, UnsupportedFieldError
from flywheel_server.engines.llama_cpp.chat_template import ChatTemplate, Fragment
from flywheel_server.engines.llama_cpp.llama import Llama
from flywheel_server.engines.llama_cpp.vocabulary import BETWEEN_WORDS, BPE, Vocabulary
from flywheel_server.messages import MAX_VIOLATIONS, FieldViolation, GenerationRequest, Message

CHUNK_CHARACTERS: Final = 2**15
"""Characters that are tokenized at a time. After each chunk, tokenizing ends if the prompt is too long or its call has ended.

Chunks also save time, because llama.cpp's time grows with the square of the number of special tokens in a chunk.
"""

MARGIN_CHARACTERS: Final = 2**10
"""Additional characters at the start of a cut text.

The first tokens of a cut text may differ from those of the whole text, so they must not be among the tokens that are kept.
"""


MAX_KEPT_CHARACTERS: Final = 2**8
MAX_KEPT_TEXTS: Final = 2**8
"""Limits of the short texts of a chat template whose tokens are kept: characters in each, and their number."""


class StoppedError(Exception):
    """Tokenizing was stopped, because the call has ended or the engine is stopping."""


class Tokenizer:
    """Makes tokens of prompts. Its methods block, and may be called from several threads.

    Arguments:
        context_tokens: Maximum number of tokens in the prompt and the generated text together.
        template: The chat template for messages. Texts are put into it unless they are in it already; None reads texts as they
            are, and refuses messages.
    """

    def __init__(self, llama: Llama, vocabulary: Vocabulary, context_tokens: int, template: ChatTemplate | None = None) -> None:
        self._llama = llama
        self._vocabulary = vocabulary
        self._context_tokens = context_tokens
        self._template = template
        self._kept_tokens = lru_cache(MAX_KEPT_TEXTS)(llama.tokenize)
        self._leading_tokens, self._trailing_tokens = _added_tokens(llama)
        self._bos = llama.bos_token() if self._leading_tokens else ""
        bos = re.escape(self._bos)
        self._leading_bos = re.compile(rf"(?:\s|{bos})*{bos}") if bos else None
        # SentencePiece adds a space to the start of each text. Between two chunks, that would add a token to the prompt.
        cuts_chunks_between_words = vocabulary.can_be_cut and vocabulary.tokenizer == BPE
        separators = {True: vocabulary.separators, False: vocabulary.user_defined_tokens.intersection(vocabulary.separators)}
        # Where a text can be cut, by `Fragment.parse_special`.
        self._chunk_cuts = {key: _cuts(texts, between_words=cuts_chunks_between_words) for key, texts in separators.items()}
        self._tail_cuts = {key: _cuts(texts, between_words=vocabulary.can_be_cut) for key, texts in separators.items()}

    def check_prompt(self, request: GenerationRequest) -> None:
        """Raises the errors of `tokens` for what is wrong with the prompt, apart from its length. Tokenizes little."""
        if request.prompt_token_ids:
            self._check_ids(request.prompt_token_ids)
        elif request.messages:
            self._prompt(request)

    def check_length(self, request: GenerationRequest) -> None:
        """Raises `PromptTooLongError` if the prompt has so many bytes that no tokens could make it fit.

        Raises the errors of `check_prompt` instead, if there are any. Passes a short prompt, for which `tokens` raises the
        error with the exact number of tokens.
        """
        longest = self._vocabulary.max_token_bytes
        if longest is None or request.prompt_bytes <= CHUNK_CHARACTERS or self._truncates_to_fit(request):
            return
        texts = [message.content for message in request.messages] or [request.text]
        # A chat template may drop the spaces at both ends.
        at_least = -(-sum(len(text.strip().encode()) for text in texts) // longest)
        if request.max_input_tokens:
            at_least = min(at_least, request.max_input_tokens)
        if at_least > self._max_prompt_tokens(request):
            self.check_prompt(request)
            raise PromptTooLongError(at_least, request.max_tokens, self._context_tokens, counted_tokens=0)

    def tokens(self, request: GenerationRequest, is_stopped: Callable[[], bool]) -> list[int]:
        """Returns the tokens of the prompt that the model reads.

        Token ids in the request are the prompt as they are: no token is added. Of every prompt, only the last
        `max_input_tokens` tokens are kept, so that a system message goes first.

        Raises `PromptTooLongError`, `InvalidFieldError` if the messages do not suit the chat template or a token id does not
        exist, `UnsupportedFieldError` if there are messages but no chat template, what `Llama.tokenize` raises, and
        `StoppedError` if `is_stopped` returns True, which is asked before each chunk.
        """
        if request.prompt_token_ids:
            return self._given_tokens(request)
        prompt = self._prompt(request)
        tail = self._tail(prompt, request.max_input_tokens) if self._truncates_to_fit(request) else prompt
        tokens = self._tokens_of(tail, request, is_stopped)
        if len(tokens) < request.max_input_tokens and tail != prompt:
            # The tail had too few tokens, because some models drop spaces.
            tokens = self._tokens_of(prompt, request, is_stopped)
        return tokens[-request.max_input_tokens :]

    def token_bytes(self, tokens: Iterable[int]) -> list[bytes]:
        """Returns the bytes of text of each token; see `Vocabulary.token_bytes`.

        Joined, the bytes of a text's tokens are the text, with what the model adds: BOS, EOS, and with SentencePiece a space at
        the start and after each special token. Spaces that a special token drops, and bytes that the vocabulary lacks, are not
        in them. Raises `IndexError` for an unknown token.
        """
        return [self._vocabulary.token_bytes[token] for token in tokens]

    def _given_tokens(self, request: GenerationRequest) -> list[int]:
        """Returns the last of the token ids in the request; raises `InvalidFieldError` and `PromptTooLongError`."""
        self._check_ids(request.prompt_token_ids)
        tokens = list(request.prompt_token_ids[-request.max_input_tokens :])
        if len(tokens) > self._max_prompt_tokens(request):
            raise PromptTooLongError(len(tokens), request.max_tokens, self._context_tokens)
        return tokens

    def _check_ids(self, tokens: Sequence[int]) -> None:
        size = len(self._vocabulary.token_bytes)
        wrong = islice((index for index, token in enumerate(tokens) if not 0 <= token < size), MAX_VIOLATIONS)
        description = f"must be 0 to {size - 1}, an id of the model's vocabulary"
        if violations := [FieldViolation(f"prompt_token_ids[{index}]", description) for index in wrong]:
            raise InvalidFieldError.of(violations)

    def _tokens_of(self, prompt: Sequence[Fragment], request: GenerationRequest, is_stopped: Callable[[], bool]) -> list[int]:
        tokens: list[int] = []
        characters = 0
        chunks = list(self._chunks(prompt)) or [([], True)]
        for number, (parts, parse_special) in enumerate(chunks, 1):
            if is_stopped():
                raise StoppedError
            tokens += self._llama.tokenize(parts, parse_special=parse_special)
            if number == 1 and tokens[: len(self._leading_tokens)] != self._leading_tokens:
                tokens[:0] = self._leading_tokens
            characters += sum(len(part) for part in parts if isinstance(part, str))
            is_all = number == len(chunks)
            if is_all:
                tokens += self._trailing_tokens
            is_checked = (is_all or characters >= CHUNK_CHARACTERS) and not self._truncates_to_fit(request)
            if is_checked and len(tokens) > self._max_prompt_tokens(request):
                counted = None if is_all else len(tokens)
                kept = len(tokens[-request.max_input_tokens :])
                raise PromptTooLongError(kept, request.max_tokens, self._context_tokens, counted)
        return tokens

    def _max_prompt_tokens(self, request: GenerationRequest) -> int:
        return self._context_tokens - request.max_tokens

    def _truncates_to_fit(self, request: GenerationRequest) -> bool:
        """Returns whether the prompt always fits, because only its last `max_input_tokens` are kept."""
        return 0 < request.max_input_tokens <= self._max_prompt_tokens(request)

    def _prompt(self, request: GenerationRequest) -> Sequence[Fragment]:
        """Returns what the model reads: messages, or a text that is not in the chat template yet, in the chat template."""
        if self._template is None:
            if request.messages:
                reason = "the model has no chat template that this server uses: its prompt_format is raw"
                raise UnsupportedFieldError("messages", reason)
            prompt = [Fragment(request.text, parse_special=True)]
        elif request.messages:
            prompt = self._template.prompt(request.messages)
        elif self._template.is_applied_to(request.text):
            prompt = [Fragment(request.text.lstrip(), parse_special=True)]
        else:
            prompt = self._template.prompt([Message(role="user", content=request.text)])
        # A prompt begins with BOS once, even if the text repeats BOS or has spaces before it.
        if self._leading_bos and prompt and prompt[0].parse_special and (found := self._leading_bos.match(prompt[0].text)):
            prompt[0] = Fragment(self._bos + prompt[0].text[found.end() :], parse_special=True)
        return prompt

    def _tail(self, prompt: Sequence[Fragment], tokens: int) -> Sequence[Fragment]:
        """Returns a suffix of the prompt that has the same last `tokens` tokens as the whole prompt.

        Returns the whole prompt if it is short, or if it cannot be cut anywhere.
        """
        if self._vocabulary.max_token_bytes is None:
            return prompt
        characters = tokens * self._vocabulary.max_token_bytes + MARGIN_CHARACTERS
        kept: list[Fragment] = []
        for fragment in reversed(prompt):
            if characters <= 0:
                break
            kept.append(Fragment(self._suffix_of(fragment, characters), fragment.parse_special))
            characters -= len(fragment.text)
        return kept[::-1]

    def _suffix_of(self, fragment: Fragment, characters: int) -> str:
        """Returns a suffix of the fragment with at least that many characters; the whole fragment if it cannot be cut."""
        end = len(fragment.text) - characters
        window = CHUNK_CHARACTERS
        while end > 0 and (cuts := self._tail_cuts[fragment.parse_special]):
            start = max(end - window, 0)
            if places := [found.start() for found in cuts.finditer(fragment.text, start, end)]:
                return fragment.text[places[-1] :]
            if not start:
                break
            window *= 2
        return fragment.text

    def _chunks(self, prompt: Sequence[Fragment]) -> Iterator[tuple[list[str | int], bool]]:
        """Yields chunks: texts and tokens, and whether special tokens are parsed in the texts.

        Each text has the same tokens by itself as within the prompt.
        """
        # A prompt with several fragments is in a chat template. What the template writes between contents is short and repeats.
        # Its tokens join the contents, because each chunk is a call of llama.cpp, however short the chunk is.
        keeps_tokens = len(prompt) > 1
        parts: list[str | int] = []
        missing = CHUNK_CHARACTERS
        parse_special = False
        for fragment in prompt:
            if keeps_tokens and fragment.parse_special and len(fragment.text) <= MAX_KEPT_CHARACTERS:
                parts += self._kept_tokens(fragment.text)
                continue
            if parts and fragment.parse_special != parse_special:
                yield parts, parse_special
                parts, missing = [], CHUNK_CHARACTERS
            parse_special = fragment.parse_special
            for text in self._cut(fragment):
                parts.append(text)
                missing -= len(text)
                if missing <= 0:
                    yield parts, parse_special
                    parts, missing = [], CHUNK_CHARACTERS
        if parts:
            yield parts, parse_special

    def _cut(self, fragment: Fragment) -> Iterator[str]:
        start = 0
        cuts = self._chunk_cuts[fragment.parse_special]
        while cuts and (cut := cuts.search(fragment.text, start + CHUNK_CHARACTERS)):
            yield fragment.text[start : cut.start()]
            start = cut.start()
        yield fragment.text[start:]


def _added_tokens(llama: Llama) -> tuple[list[int], list[int]]:
    """Returns the tokens with which the model expects a text to begin, and those with which it expects a text to end."""
    bare, whole = llama.tokenize("a"), llama.tokenize("a", add_special=True)
    start = next((at for at in range(len(whole)) if whole[at : at + len(bare)] == bare), len(whole))
    return whole[:start], whole[start + len(bare) :]


def _cuts(separators: Iterable[str], *, between_words: bool) -> re.Pattern[str] | None:
    """Returns a pattern that matches where a text can be cut; None if it cannot be cut anywhere."""
    places = [BETWEEN_WORDS.pattern] if between_words else []
    places += [f"(?={re.escape(text)})" for text in separators]
    return re.compile("|".join(places)) if places else None
