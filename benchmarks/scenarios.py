"""The kinds of load on a server: the number of concurrent calls, their method, and the speed of the engine."""

from dataclasses import dataclass
from typing import Final, Literal

TEXT: Final = "The llama is a domesticated South American camelid, it hums."
"""The text that the scripted engine repeats: whole tokens of four characters, so that each token is a delta."""

UNLIMITED: Final = 100_000
"""More concurrent calls than any scenario has."""

REPEATING_PROMPT: Final = "<|im_start|>Song %d:" + " la" * 40
"""A prompt that a model with temperature 0 continues until max_tokens, so that all servers do the same work."""

LONG_PROMPT: Final = "<|im_start|>" + " ".join(
    f"{number} llamas hum, and {number + 1} alpacas listen." for number in range(120)
)
"""About 1,500 tokens."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """One kind of load.

    Attributes:
        name: The name for `--scenarios`.
        kind: In "paced" streams, tokens come at a fixed rate, and each stream makes one call. In "unpaced" streams, tokens come
            as fast as the server can send them, and each stream makes one call after the other. "unary" callers make one
            GenerateAll call after the other. "model" streams are unpaced, and a model generates.
        streams: Number of concurrent calls.
        rate: Tokens per second of a paced stream.
        max_tokens: Tokens of a call that is not paced.
        stagger: Seconds over which the first calls of the streams begin, evenly spread.
        interrupted: Whether one more caller sends `LONG_PROMPT` while the streams run.
        longer: Factor for the measured seconds.
    """

    name: str
    kind: Literal["paced", "unpaced", "unary", "model"]
    streams: int
    rate: int = 0
    max_tokens: int = 0
    stagger: float = 1.0
    interrupted: bool = False
    longer: float = 1.0

    @property
    def delay(self) -> float:
        """Seconds before each token."""
        return 1 / self.rate if self.rate else 0.0

    def tokens(self, seconds: float) -> int:
        """Returns the tokens of a call if the round is measured for `seconds` after the stagger."""
        return self.max_tokens or max(1, round((self.stagger + seconds) * self.rate))

    @property
    def unit(self) -> str:
        """The unit of work of a server: "call", "token" or "delta"."""
        return {"unary": "call", "model": "token"}.get(self.kind, "delta")


SCENARIOS: Final = (
    *(Scenario(f"paced-{streams}", "paced", streams, rate=50) for streams in (1, 16, 64, 256, 512)),
    Scenario("paced-2000", "paced", 2000, rate=50, stagger=2.0),
    Scenario("paced-2000x10", "paced", 2000, rate=10, stagger=2.0),
    Scenario("unpaced-64", "unpaced", 64, max_tokens=500),
    *(Scenario(f"unary-{callers}", "unary", callers, max_tokens=1) for callers in (1, 64, 512)),
    *(Scenario(f"model-{streams}", "model", streams, max_tokens=64, stagger=0.2, longer=2.5) for streams in (1, 4, 8)),
    Scenario("model-long-prompt", "model", 4, max_tokens=300, stagger=0.2, interrupted=True, longer=5),
)
"""Paced streams get 50 tokens/s, or 10 if their name ends with x10."""
