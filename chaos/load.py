"""Plans the calls that are made during a disruption, and checks and records their outcomes.

The engine repeats the prompt, and each call has a prompt of its own, so every character of every text is known.
"""

import codecs
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final, Literal

Kind = Literal["generate", "generate_deltas", "generate_all"]
End = Literal["finish", "cancel", "deadline"]

BYTES_PER_TOKEN: Final = 4
TOKEN_DELAY: Final = 0.1
"""Seconds before each token."""
MAX_TOKENS: Final = 40
"""Maximum tokens of a call that is planned to finish: it takes up to 4 s."""
ENDLESS_TOKENS: Final = 3000
"""Tokens of a call that is planned to be cancelled or to reach its deadline: without that, it takes 5 minutes."""


@dataclass(frozen=True, slots=True)
class Load:
    """The calls that a process of callers makes.

    Attributes:
        app: The app of the gateways.
        key: The API key.
        authority: The path of the CA certificate (PEM) that signs the tunnels' certificates.
        streams: Concurrent calls, half by `Client` and half by `AsyncClient`.
        seconds: Seconds during which new calls begin, unless stdin is closed before.
        calls: Maximum number of calls.
        cancelled: Fraction of the calls that are cancelled.
        cut_short: Fraction of the calls with a short deadline.
        soon: Maximum seconds until a call is cancelled, or reaches its short deadline.
        deadline: Seconds until the deadline of all other calls.
        seed: Seed of the random numbers.
    """

    app: str
    key: str
    authority: str
    streams: int = 64
    seconds: float = 60.0
    calls: int = 1_000_000
    cancelled: float = 0.2
    cut_short: float = 0.1
    soon: float = 3.0
    deadline: float = 30.0
    seed: int = 5


@dataclass(frozen=True, slots=True)
class Plan:
    """One planned call. `after` is the seconds until it is cancelled; `timeout` is the seconds until its deadline."""

    kind: Kind
    prompt: str
    max_tokens: int
    num_samples: int
    end: End
    after: float
    timeout: float

    @property
    def fields(self) -> dict[str, Any]:
        """The arguments of the client's method."""
        return {
            "text": self.prompt,
            "max_tokens": self.max_tokens,
            "num_samples": self.num_samples,
            "timeout": self.timeout,
        }


def plans(load: Load, stream: int) -> Iterator[Plan]:
    """Yields the calls of one stream, one after the other."""
    chance = Random(f"{load.seed} {stream}")
    for number in itertools.count():
        drawn = chance.random()
        end: End = "cancel" if drawn < load.cancelled else "deadline" if drawn < load.cancelled + load.cut_short else "finish"
        soon = chance.uniform(0.01, load.soon)
        yield Plan(
            kind=chance.choice(("generate", "generate_deltas", "generate_all")),
            prompt=f"🦙 {load.seed}/{stream}/{number}: {chance.getrandbits(64):x}. ",
            max_tokens=chance.randint(1, MAX_TOKENS) if end == "finish" else ENDLESS_TOKENS,
            num_samples=chance.choice((1, 1, 2)),
            end=end,
            after=soon,
            timeout=soon if end == "deadline" else load.deadline,
        )


def text_of(plan: Plan) -> str:
    """Returns the complete text of each sample of a call."""
    encoded = plan.prompt.encode()
    # Each repetition of the prompt starts with a new token, so its last token may be shorter.
    tokens = [encoded[start : start + BYTES_PER_TOKEN] for start in range(0, len(encoded), BYTES_PER_TOKEN)]
    played = b"".join(tokens[number % len(tokens)] for number in range(plan.max_tokens))
    return codecs.getincrementaldecoder("utf-8")().decode(played)


class Received:
    """Checks the answers of one call as they arrive."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._whole = text_of(plan)
        self._texts: dict[int, str] = {}
        self._tokens: dict[int, int] = {}
        self._finished: set[int] = set()
        self.wrong = ""
        """The first problem of the answers; empty if there is none."""

    def delta(self, index: int, text: str, generated_tokens: int, finish_reason: str) -> None:
        """Checks a delta, or a whole sample."""
        if index in self._finished:
            self._note(f"sample {index} goes on after its end")
        if generated_tokens < self._tokens.get(index, 0):
            self._note(f"sample {index} has fewer tokens than before")
        self._texts[index] = self._texts.get(index, "") + text
        self._tokens[index] = generated_tokens
        if not self._whole.startswith(self._texts[index]):
            self._note(f"sample {index} is not the text of its prompt: …{self._texts[index][-60:]!r}")
        if finish_reason:
            self._finished.add(index)

    def end(self) -> None:
        """Checks that a call that ended with OK has all of its text."""
        if self._finished != set(range(self._plan.num_samples)):
            self._note(f"samples {sorted(self._finished)} of {self._plan.num_samples} have finished")
        for index, text in self._texts.items():
            if (text, self._tokens[index]) != (self._whole, self._plan.max_tokens):
                self._note(f"sample {index} is not complete: {self._tokens[index]} of {self._plan.max_tokens} tokens")

    def _note(self, problem: str) -> None:
        self.wrong = self.wrong or problem


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of a call. Times are seconds of the monotonic clock, which all processes of a machine share.

    Attributes:
        client: The kind of client: "threads" or "asyncio".
        kind: The method.
        end: The planned end.
        status: The name of the call's status.
        reason: The reason in the `ErrorInfo` of the status.
        message: The message of the status.
        begun: When the call began.
        ended: When the call ended.
        due: When the call should have ended at the latest.
        wrong: The problem of the call's text; empty if there is none.
    """

    client: str
    kind: Kind
    end: End
    status: str
    reason: str
    message: str
    begun: float
    ended: float
    due: float
    wrong: str = field(default="")

    @property
    def as_planned(self) -> bool:
        """Whether the call ended with the status of its planned end."""
        return self.status == {"finish": "OK", "cancel": "CANCELLED", "deadline": "DEADLINE_EXCEEDED"}[self.end]
