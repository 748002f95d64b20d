"""What a load client does to a server: how many calls at a time, of which kind, and how fast the engine is."""

from dataclasses import dataclass
from typing import Final, Literal

TEXT: Final = "The llama is a domesticated South American camelid, it hums."
"""What the scripted engine says over and over: whole tokens of four characters, so that each token is a delta."""

UNLIMITED: Final = 100_000
"""More calls at a time than any scenario has."""

SONG: Final = "<|im_start|>Song %d:" + " la" * 40
"""A prompt that a model, if it is greedy, goes on with until max_tokens, so that all servers do the same work."""

LONG_PROMPT: Final = "<|im_start|>" + " ".join(
    f"{number} llamas hum, and {number + 1} alpacas listen." for number in range(120)
)
"""About 1,500 tokens."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """One kind of load.

    Attributes:
        name: What `--scenarios` calls it.
        kind: "paced" streams get a token after each delay, and each stream makes one call. "unpaced" streams get tokens as fast
            as the server can send them, and make call after call. "unary" callers ask for the whole answer, call after call.
            "model" streams are unpaced ones of a model.
        streams: Calls at a time.
        rate: Tokens per second of a paced stream.
        max_tokens: Tokens of a call that is not paced.
        stagger: Seconds over which the first calls of the streams begin, evenly.
        interrupted: Whether one more caller sends `LONG_PROMPT` while the streams run.
        longer: How many times as long as others it is measured.
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
        """Returns the tokens of a call in a round that is measured for so many seconds, which begin after the stagger."""
        return self.max_tokens or max(1, round((self.stagger + seconds) * self.rate))

    @property
    def unit(self) -> str:
        """What a server does in it over and over."""
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
