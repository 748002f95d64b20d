"""Computes the figures of runs: medians with ranges, and ratios of two peers. Pure functions."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

from benchmarks.runs import Run

Figure = Callable[[Run], float | None]
"""Returns a figure of a run, or None if the run has none."""


@dataclass(frozen=True, slots=True)
class Spread:
    """The median, the minimum and the maximum of some values."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self | None:
        """Returns the spread of the values; None if there are none."""
        return cls(statistics.median(values), min(values), max(values)) if values else None


def select(runs: Sequence[Run], scenario: str, peer: str) -> list[Run]:
    """Returns the runs of a scenario on a peer."""
    return [run for run in runs if (run.scenario, run.peer) == (scenario, peer)]


def spread(runs: Sequence[Run], figure: Figure) -> Spread | None:
    """Returns the median and the range of a figure over runs; None if no run has the figure."""
    return Spread.of([value for run in runs if (value := figure(run)) is not None])


def ratio(over: Sequence[Run], under: Sequence[Run], figure: Figure) -> Spread | None:
    """Returns the median and the range of the ratio of a figure, which is computed within each round."""
    by_round = {run.round: figure(run) for run in under}
    pairs = [(figure(run), by_round.get(run.round)) for run in over]
    return Spread.of([first / second for first, second in pairs if first is not None and second])


def cpu(run: Run) -> float | None:
    """Returns the µs of the server's CPU time for each token, or for each call if calls have one token."""
    return 1e6 * run.cpu_seconds / run.load["tokens"] if run.load["tokens"] else None


def client_cpu(run: Run) -> float | None:
    """Returns the µs of the load client's CPU time for each token."""
    return 1e6 * run.load["client_cpu_seconds"] / run.load["tokens"] if run.load["tokens"] else None


def tokens_per_second(run: Run) -> float:
    """Returns the tokens that arrived per second while all streams ran."""
    return float(run.load["tokens_per_second"])


def tokens_per_message(run: Run) -> float | None:
    """Returns the tokens per message: more than 1 if deltas were merged."""
    return run.load["tokens"] / run.load["messages"] if run.load["messages"] else None


def memory(run: Run, streams: int) -> float:
    """Returns the KiB by which the server's memory grew for each open stream."""
    return (run.peak_bytes - run.base_bytes) / streams / 1024


def start_seconds(run: Run) -> float:
    """Returns the seconds from the start of the process to the first answer."""
    return run.start_seconds


def prompt_seconds(run: Run) -> float | None:
    """Returns the seconds that the caller of the long prompt waited for its first token."""
    return run.interruption.prompt_seconds if run.interruption else None


def kept(run: Run) -> float | None:
    """Returns the share of its speed that a stream kept while the long prompt was read, as the median over the streams."""
    return statistics.median(run.interruption.kept) if run.interruption and run.interruption.kept else None


def failures(run: Run) -> int:
    """Returns the number of calls that did not end with OK, or whose text or number of tokens is wrong."""
    load = run.load
    wrong = int(load["calls"]) - int(load["statuses"].get("OK", 0))
    return wrong + int(load["wrong_texts"]) + int(load["wrong_counts"])


def failed_share(run: Run) -> float:
    """Returns the share of calls that failed; see `failures`."""
    return failures(run) / int(run.load["calls"])


def _times(name: str, part: str) -> Figure:
    def figure(run: Run) -> float | None:
        times: dict[str, Any] | None = run.load[name]
        return float(times[part]) if times else None

    return figure


FIRST_P50: Final = _times("first_message_ms", "p50")
FIRST_P99: Final = _times("first_message_ms", "p99")
GAP_P50: Final = _times("gap_ms", "p50")
GAP_P99: Final = _times("gap_ms", "p99")
"""Milliseconds from the call to its first message, and from one message of a stream to the next."""
