"""Tries a grammar, to see what it would cost llama.cpp to work out which tokens may come next.

llama.cpp works that out before each token. If it takes LLGuidance too long, LLGuidance gives up, and llama.cpp goes on without
the constraint. The cost of a regular expression depends on how many states it has, which its length does not tell:
`.*[aeiou].{30}` has a thousand million.
"""

import json
import random
from functools import cache
from typing import Final

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

LLAMA_CPP_FUEL: Final = 200_000
"""Work of LLGuidance that llama.cpp allows for a step."""

REGEX_FUEL: Final = LLAMA_CPP_FUEL // 20
"""Work allowed for a step of a trial of one regular expression. More of a model's tokens fit than of those for trials."""

SCHEMA_FUEL: Final = LLAMA_CPP_FUEL // 5
"""Work allowed for a step of a trial of a whole schema, whose regular expressions have had trials of their own."""

MAX_STEP_ITEMS: Final = 10_000
"""Maximum number of items that LLGuidance's parser makes in one step of a trial. llama.cpp allows 50,000."""

MAX_ROW_ITEMS: Final = 1_000
"""Maximum number of items for one byte of text. llama.cpp allows 2,000."""

TOKENS: Final = 16_384
"""Tokens of the vocabulary for trials."""

ALPHABETS: Final = (
    *("etaoinshrdlucmfwypvbgkjqxz",) * 6,
    *("EeTtAaOoIiNnSsHhRrDdLlUuCcMm", "0123456789", "0123456789.,:;-+/ ", "\"'{}[]()<>=_\\#*&%$!?@|~^`", " \n\t-*.#"),
    *("éèüößñçåøłčšžаеинорствлк", "的一是不了人我在有他这中国", "日本語の文字あいうえお한국어العربية", "\u00a0\u2028😀🎉—“”…"),
)
"""Characters of the tokens, as often as they are listed."""


def is_affordable(grammar: str, tokens: int, texts: int = 1, fuel: int = REGEX_FUEL) -> bool:
    """Returns whether LLGuidance can follow the grammar along random texts, with a fraction of what llama.cpp allows.

    Each text has that many tokens. The answer for a grammar is always the same. A token takes at most 0.5 ms of CPU time.
    """
    limits = LLParserLimits(step_lexer_fuel=fuel, step_max_items=MAX_STEP_ITEMS, max_items_in_row=MAX_ROW_ITEMS)
    matcher = LLMatcher(trial_tokenizer(), grammar, log_level=0, limits=limits)
    chance = random.Random(0)  # noqa: S311 - to be repeatable
    return all(_follows(matcher.deep_copy(), chance, tokens) for _ in range(texts))


def _follows(matcher: LLMatcher, chance: random.Random, tokens: int) -> bool:
    for _ in range(tokens):
        mask = matcher.compute_bitmask()
        allowed = [index for index, bits in enumerate(mask) if bits]
        if matcher.is_error() or not allowed:
            return False
        index = chance.choice(allowed)
        token = index * 8 + chance.choice([bit for bit in range(8) if mask[index] >> bit & 1])
        if token == TOKENS or not matcher.consume_token(token) or matcher.is_stopped():
            break
    return not matcher.is_error()


def has_few_states(pattern: str) -> bool:
    """Returns whether LLGuidance finds all states of a regular expression, with little work. It takes at most 30 ms.

    Then the expression cannot cost more than that in any text.
    """
    inner = pattern.removeprefix("^").removesuffix("$")
    # To tell that no text matches both, LLGuidance has to go through all states of the pattern. It gives up after 10,000 units.
    both = {f"^(?:{inner}){end}$": True for end in (r"\x00", r"\x01")}
    schema = {"type": "object", "patternProperties": both, "additionalProperties": False}
    return not LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(json.dumps(schema)))


class _Tokens:
    """The vocabulary for trials: every byte, and random words of some alphabets. `__call__` tokenizes."""

    eos_token_id = TOKENS
    bos_token_id = None
    special_token_ids = (TOKENS,)

    def __init__(self) -> None:
        chance = random.Random(0)  # noqa: S311 - to be repeatable
        tokens = dict.fromkeys(bytes([byte]) for byte in range(256))
        while len(tokens) < TOKENS:
            alphabet = chance.choice(ALPHABETS)
            # As in models' vocabularies, a token has at most three digits.
            length = min(1 + int(chance.expovariate(0.25)), 3 if alphabet.isdigit() else 16)
            word = "".join(chance.choices(alphabet, k=length))
            tokens[(chance.choice(("", " ")) + word).encode()] = None
        self.tokens = [*tokens, b"\xff<eos>"]

    def __call__(self, text: bytes) -> list[int]:
        return list(text)  # the first 256 tokens are the bytes


@cache
def trial_tokenizer() -> LLTokenizer:
    """Returns the vocabulary for trials. The first call takes 0.2 s, during most of which no other thread can run Python."""
    return LLTokenizer(TokenizerWrapper(_Tokens()))
