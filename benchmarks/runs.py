"""The measurements of a server in one round of a scenario."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Interruption:
    """The effect of a long prompt on the streams that run while it is read.

    Attributes:
        prompt_seconds: Seconds from the call with the long prompt to its first token.
        kept: For each stream that had tokens before, its tokens/s while the prompt is read, as a share of its tokens/s before.
    """

    prompt_seconds: float
    kept: Sequence[float]


@dataclass(frozen=True, slots=True)
class Run:
    """One round of a scenario on a peer.

    Attributes:
        peer: The name of the peer.
        scenario: The name of the scenario.
        round: The number of the round, from 0.
        load: The report of the load client; `report` in load/client/record.go has its fields.
        start_seconds: Seconds from the start of the process to the first answer.
        cpu_seconds: CPU time of the server during the load.
        base_bytes: Resident memory of the server after a call on each connection, before the load.
        peak_bytes: Maximum resident memory of the server during the load.
        interruption: The effect of the long prompt, if the scenario has one.
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
        """Returns the run as one line of JSON."""
        return json.dumps(asdict(self))


def interruption(streams: Sequence[Sequence[dict[str, float]]], before: float, start: float, end: float) -> Interruption:
    """Returns the effect of a long prompt on the streams.

    Arguments:
        streams: The messages of each stream: its arrival time (`at`) and its number of tokens (`tokens`).
        before: The beginning of the time for the comparison. All times are seconds since the epoch.
        start: When the prompt was sent.
        end: When the prompt's first token arrived.
    """
    # After the end of the last stream there is nothing to compare.
    last = max((message["at"] for stream in streams for message in stream), default=start)
    if last <= start:
        return Interruption(end - start, [])

    def speed(stream: Sequence[dict[str, float]], since: float, until: float) -> float:
        return sum(message["tokens"] for message in stream if since < message["at"] <= until) / (until - since)

    speeds = [(speed(stream, before, start), speed(stream, start, min(end, last))) for stream in streams]
    return Interruption(end - start, [during / earlier for earlier, during in speeds if earlier])
