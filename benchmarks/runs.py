"""What was seen of a server in one round of a scenario."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Interruption:
    """What a long prompt does to the streams that run while it is read.

    Attributes:
        prompt_seconds: How long the caller of the long prompt waited for its first token.
        kept: Of each stream that had tokens before, its tokens/s meanwhile as a share of those before.
    """

    prompt_seconds: float
    kept: Sequence[float]


@dataclass(frozen=True, slots=True)
class Run:
    """One round of a scenario on a peer.

    Attributes:
        peer: The name of the peer.
        scenario: The name of the scenario.
        round: Which round it was, from 0 on.
        load: What the load client saw; `report` in load/client/record.go has its fields.
        start_seconds: From the start of the process to the first answer.
        cpu_seconds: CPU time of the server during the load.
        base_bytes: Resident memory of the server once it had answered a call on each connection.
        peak_bytes: The most resident memory that it had during the load.
        interruption: Of a scenario that is interrupted.
    """

    peer: str
    scenario: str
    round: int
    load: dict[str, Any]
    start_seconds: float
    cpu_seconds: float
    base_bytes: int
    peak_bytes: int
    interruption: Interruption | None = None

    def as_json(self) -> str:
        """Returns it as one line."""
        return json.dumps(asdict(self))


def interruption(streams: Sequence[Sequence[dict[str, float]]], before: float, start: float, end: float) -> Interruption:
    """Returns what a prompt that was read from `start` to `end` did to the streams, which ran undisturbed from `before` on.

    Arguments:
        streams: The messages of each stream: when each arrived (`at`), and how many tokens it had (`tokens`).
        before: When to begin, in seconds since the epoch, as all times.
        start: When the prompt was sent.
        end: When its first token arrived.
    """
    # Streams that end sooner than the prompt say nothing about the time after that.
    last = max((message["at"] for stream in streams for message in stream), default=start)
    if last <= start:
        return Interruption(end - start, [])

    def speed(stream: Sequence[dict[str, float]], since: float, until: float) -> float:
        return sum(message["tokens"] for message in stream if since < message["at"] <= until) / (until - since)

    speeds = [(speed(stream, before, start), speed(stream, start, min(end, last))) for stream in streams]
    return Interruption(end - start, [during / earlier for earlier, during in speeds if earlier])
