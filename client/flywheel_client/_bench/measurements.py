"""Collects the times and outcomes of the calls of a run, in memory that is bounded for a run of any length."""

from dataclasses import dataclass, field
from typing import Any, Final

from flywheel_client._bench.histogram import Histogram

MAX_INTERVALS: Final = 240
"""The most intervals of a timeline. If a run is longer, two intervals become one, so that there are always 120 to 240."""

MIN_CALLS_PER_INTERVAL: Final = 5
"""The calls that an interval should have on average."""

MAX_SPARSE_INTERVALS: Final = 40
"""The most intervals of a timeline whose intervals have fewer calls than that. They are enough for a plot."""

FIRST_INTERVAL_SECONDS: Final = 0.05
"""The length of the intervals when a run begins."""

MAX_ERROR_KINDS: Final = 100
"""The most kinds of errors that are told apart; further kinds count as one."""

OTHER_ERRORS: Final = ("OTHER", "")

UNFINISHED: Final = ("CANCELLED", "UNFINISHED")
"""The code and reason of calls that the bench itself ended, because the run was over."""


@dataclass(slots=True)
class Interval:
    """What happened in a part of the run."""

    sent: int = 0
    """Calls that were due in this interval."""
    failed: int = 0
    """Calls that failed in this interval."""
    tokens: int = 0
    """Tokens that arrived in this interval."""
    waits: Histogram = field(default_factory=Histogram)
    """How long callers waited for the first answer, of the calls that were due in this interval."""

    def merge(self, other: "Interval") -> None:
        """Adds the next interval to this one."""
        self.sent += other.sent
        self.failed += other.failed
        self.tokens += other.tokens
        self.waits.merge(other.waits)


class Timeline:
    """What happened when: equal intervals from the beginning of the run."""

    def __init__(self) -> None:
        self.interval_seconds = FIRST_INTERVAL_SECONDS
        self.intervals: list[Interval] = []

    def at(self, seconds: float) -> Interval:
        """Returns the interval at so many seconds from the beginning of the run."""
        number = max(int(seconds / self.interval_seconds), 0)
        while number >= MAX_INTERVALS:
            self._merge_pairs()
            number = int(seconds / self.interval_seconds)
        while len(self.intervals) <= number:
            self.intervals.append(Interval())
        return self.intervals[number]

    def coarsen(self) -> None:
        """Makes the intervals longer, so that most of them have some calls. Call this at the end of the run."""
        calls = sum(interval.sent for interval in self.intervals)
        while len(self.intervals) > MAX_SPARSE_INTERVALS and calls < MIN_CALLS_PER_INTERVAL * len(self.intervals):
            self._merge_pairs()

    def _merge_pairs(self) -> None:
        """Makes each two intervals one."""
        for first, second in zip(self.intervals[::2], self.intervals[1::2], strict=False):
            first.merge(second)
        self.intervals = self.intervals[::2]
        self.interval_seconds *= 2


@dataclass(slots=True)
class ErrorCount:
    """How many calls failed in one way, with the message of the first of these calls."""

    count: int
    message: str


@dataclass(slots=True)
class Measurements:
    """The times and outcomes of the calls of a run. Times that a caller waits count from when the call was due to be sent."""

    first_token: Histogram = field(default_factory=Histogram)
    """From when the call was due to its first delta. Only GenerateDeltas has deltas."""
    inter_token: Histogram = field(default_factory=Histogram)
    """Between two tokens of a sample. Tokens that arrive as one delta share the time since the delta before it."""
    per_output_token: Histogram = field(default_factory=Histogram)
    """For each sample: the time from its first delta to its last delta, divided by the tokens that came after the first."""
    longest_pause: Histogram = field(default_factory=Histogram)
    """For each sample: the longest time between two deltas."""
    duration: Histogram = field(default_factory=Histogram)
    """From when the call was due to its end."""
    send_delay: Histogram = field(default_factory=Histogram)
    """From when the call was due to when it was sent."""
    timeline: Timeline = field(default_factory=Timeline)
    errors: dict[tuple[str, str], ErrorCount] = field(default_factory=dict)
    """The failed calls by code and reason."""
    sent: int = 0
    succeeded: int = 0
    lower_bounds: int = 0
    """Calls that count in `first_token` or `duration` with the time until they were given up, because they took longer."""
    prompt_tokens: int = 0
    """Of successful calls; a prompt counts once for a call."""
    generated_tokens: int = 0
    """All tokens that arrived, also those of calls that failed later."""

    @property
    def failed(self) -> int:
        """How many calls failed, including calls that the end of the run cancelled."""
        return sum(error.count for error in self.errors.values())

    def add_error(self, code: str, reason: str, message: str, at: float) -> None:
        """Counts a call that failed at so many seconds from the beginning of the run."""
        kind = (code, reason)
        if kind not in self.errors and len(self.errors) >= MAX_ERROR_KINDS:
            kind, message = OTHER_ERRORS, ""
        self.errors.setdefault(kind, ErrorCount(0, message)).count += 1
        self.timeline.at(at).failed += 1

    def latencies(self) -> dict[str, Histogram]:
        """Returns the histograms of the report that have durations, by the name that JSON has for them."""
        named: dict[str, Any] = {
            "first_token": self.first_token,
            "inter_token": self.inter_token,
            "per_output_token": self.per_output_token,
            "longest_pause": self.longest_pause,
            "duration": self.duration,
        }
        return {name: histogram for name, histogram in named.items() if histogram.count}
