"""Tries a grammar, to see what it would cost llama.cpp to work out which tokens may come next.

llama.cpp works that out before each token. If it takes LLGuidance too long, LLGuidance gives up, and llama.cpp goes on without
the constraint. The cost of a regular expression depends on how many states it has, which its length does not tell:
`.*[aeiou].{30}` has a thousand million.
"""

import json
import math
import random
import time
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

MAX_START_SECONDS: Final = 0.05
"""CPU time that llama.cpp may take to build a grammar, in the step that all slots share."""

STARTS_SECONDS: Final = 0.03
"""CPU time that llama.cpp may take to build the grammars of all samples that start in one step, if there are several."""

MAX_TRIAL_SECONDS: Final = 0.06
"""CPU time after which a trial ends, and has shown that the grammar is affordable. A token of a costly one takes 0.5 ms."""

REPEATS: Final = (1, 8)
"""How often a trial repeats a token. Repeated tokens cost little, and lead to what comes after a thousand characters."""

START_TRIALS: Final = 2
"""How often the CPU time of building a grammar is measured, because something else on the machine can slow down one trial."""

TOO_COSTLY: Final = "takes too much work: use fewer or simpler alternatives, and smaller counts"

ALLOWS_NOTHING: Final = "allows no text, or a beginning after which nothing is allowed"

NOTHING_FOLLOWS: Final = "NoExtensionBias"
"""How LLGuidance's error begins if no token may follow, and the text may not end."""

TOKENS: Final = 16_384
"""Tokens of the vocabulary for trials."""

ALPHABETS: Final = (
    *("etaoinshrdlucmfwypvbgkjqxz",) * 6,
    *("EeTtAaOoIiNnSsHhRrDdLlUuCcMm", "0123456789", "0123456789.,:;-+/ ", "\"'{}[]()<>=_\\#*&%$!?@|~^`", " \n\t-*.#"),
    *("éèüößñçåøłčšžаеинорствлк", "的一是不了人我在有他这中国", "日本語の文字あいうえお한국어العربية", "\u00a0\u2028😀🎉—“”…"),
)
"""Characters of the tokens, as often as they are listed."""


def trial_problem(grammar: str, tokens: int, texts: int = 1, fuel: int = REGEX_FUEL) -> str | None:
    """Returns `TOO_COSTLY` or `ALLOWS_NOTHING` if LLGuidance cannot follow the grammar along random texts, and None if it can.

    It may use a fraction of what llama.cpp allows. Each text has that many tokens, or fewer if the trial has taken
    `MAX_TRIAL_SECONDS`. The chance is the same in each trial.
    """
    limits = LLParserLimits(step_lexer_fuel=fuel, step_max_items=MAX_STEP_ITEMS, max_items_in_row=MAX_ROW_ITEMS)
    tokenizer = trial_tokenizer()
    begun = time.thread_time()
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    if time.thread_time() - begun > MAX_START_SECONDS:
        return TOO_COSTLY
    chance = random.Random(0)  # noqa: S311 - to be repeatable
    ends_at = begun + MAX_TRIAL_SECONDS
    followed = (_follow(matcher.deep_copy(), chance, tokens, ends_at) for _ in range(texts))
    return next((problem for problem in followed if problem), None)


def _follow(matcher: LLMatcher, chance: random.Random, tokens: int, ends_at: float) -> str | None:
    for _ in range(tokens):
        if time.thread_time() > ends_at:
            break
        mask = matcher.compute_bitmask()
        allowed = [index for index, bits in enumerate(mask) if bits]
        if matcher.is_error() or not allowed:
            break
        index = chance.choice(allowed)
        token = index * 8 + chance.choice([bit for bit in range(8) if mask[index] >> bit & 1])
        if token == TOKENS or not matcher.try_consume_tokens([token] * chance.choice(REPEATS)) or matcher.is_stopped():
            break
    if not matcher.is_error():
        return None
    return ALLOWS_NOTHING if matcher.get_error().startswith(NOTHING_FOLLOWS) else TOO_COSTLY


def starts_per_step(grammar: str) -> int:
    """Returns how many samples may start in one step of llama.cpp, which builds the grammar for each of them. At least 1."""
    tokenizer = trial_tokenizer()
    seconds = math.inf
    for _ in range(START_TRIALS):
        begun = time.thread_time()
        LLMatcher(tokenizer, grammar, log_level=0).compute_bitmask()
        seconds = min(seconds, time.thread_time() - begun)
    return max(1, int(STARTS_SECONDS / seconds))


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
