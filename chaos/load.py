"""The calls that are made while something fails: what each asks for, and what came of it.

The engine says the prompt over and over, and each call has a prompt of its own, so that every character of every text is known.
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
"""Tokens of a call that may finish: it takes up to 4 s."""
ENDLESS_TOKENS: Final = 3000
"""Tokens of a call that is cancelled or cut short: if nobody stops it, the engine works on it for 5 minutes."""


@dataclass(frozen=True, slots=True)
class Load:
    """What a process of callers does.

    Attributes:
        app: The app of the gateways.
        key: The API key.
        authority: The file with the certificate (PEM) that the tunnels' certificates are signed with.
        streams: How many calls are made at a time; one half by `Client`, the other by `AsyncClient`.
        seconds: How long calls begin, unless stdin is closed before.
        calls: How many calls begin at most.
        cancelled: Which part of the calls is cancelled.
        cut_short: Which part of the calls has a short deadline.
        soon: Within how many seconds a call is cancelled or cut short.
        deadline: The seconds that every other call may take.
        seed: What chance begins with.
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
    """One call: `after` is the seconds until it is cancelled, and `timeout` until its deadline."""

    kind: Kind
    prompt: str
    max_tokens: int
    num_samples: int
    end: End
    after: float
    timeout: float

    @property
    def fields(self) -> dict[str, Any]:
        """The arguments of the method of either client."""
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
    """Returns the whole text of each of its samples."""
    encoded = plan.prompt.encode()
    # Tokens begin anew with each repetition, whose last may be shorter.
    tokens = [encoded[start : start + BYTES_PER_TOKEN] for start in range(0, len(encoded), BYTES_PER_TOKEN)]
    played = b"".join(tokens[number % len(tokens)] for number in range(plan.max_tokens))
    return codecs.getincrementaldecoder("utf-8")().decode(played)


class Received:
    """What has come of one call so far, and what is wrong with it."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._whole = text_of(plan)
        self._texts: dict[int, str] = {}
        self._tokens: dict[int, int] = {}
        self._finished: set[int] = set()
        self.wrong = ""
        """What is wrong with it: empty if nothing is."""

    def delta(self, index: int, text: str, generated_tokens: int, finish_reason: str) -> None:
        """Takes a piece of a sample, or all of it."""
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
        """Takes the end of a call that ended with OK."""
        if self._finished != set(range(self._plan.num_samples)):
            self._note(f"samples {sorted(self._finished)} of {self._plan.num_samples} have finished")
        for index, text in self._texts.items():
            if (text, self._tokens[index]) != (self._whole, self._plan.max_tokens):
                self._note(f"sample {index} is not whole: {self._tokens[index]} of {self._plan.max_tokens} tokens")

    def _note(self, what: str) -> None:
        self.wrong = self.wrong or what


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a call. Times are seconds of the monotonic clock, which all processes of a machine share.

    Attributes:
        client: Which client made it.
        kind: The method.
        end: How it was planned to end.
        status: The name of the status that it ended with.
        reason: The reason of the status, as `ErrorInfo` has it.
        message: What the status says.
        begun: When it began.
        ended: When it ended.
        due: When it should have ended at the latest.
        wrong: What is wrong with its text; empty if nothing is.
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
        """Whether it ended as it was planned to."""
        return self.status == {"finish": "OK", "cancel": "CANCELLED", "deadline": "DEADLINE_EXCEEDED"}[self.end]
