"""The report of a run, and its form in JSON."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final, Self

from flywheel_client._bench.driver import Outcome, Plan
from flywheel_client._bench.histogram import Histogram
from flywheel_client._bench.measurements import Timeline
from flywheel_client._bench.overhead import MAX_LOOP_SHARE
from flywheel_client._bench.schedule import arrival_times

FORMAT: Final = "flywheel bench"
VERSION: Final = 1
"""The version of the form in JSON. A later version that adds a field keeps the number."""

MAX_REPORT_BYTES: Final = 64 * 2**20

LATENCY_TITLES: Final[Mapping[str, str]] = {
    "first_token": "time to first token",
    "inter_token": "inter-token latency",
    "per_output_token": "time per output token",
    "longest_pause": "longest pause of a sample",
    "duration": "call duration",
}
"""What people call the latencies, in the order of the report."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What was measured, and how: a run with the same setup can be compared."""

    server: str
    """The address, or the name of the app on Modal."""
    model: str
    engine: str
    method: str
    load: str
    """The load in words."""
    prompts: str
    """The name of the file, or "built-in"."""
    connections: int
    timeout: float
    """The seconds that each call may take."""
    fields: Mapping[str, Any]
    """The fields of all requests, unless a line of the file overrides them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureCount:
    """How many calls failed with a status code and reason, and the message of the first of these calls."""

    code: str
    reason: str
    count: int
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchUsage:
    """What the bench itself used. Shares are of one processor. Lag and delay are the 99th percentiles, in seconds."""

    loop_cpu_share: float
    cpu_share: float
    loop_lag: float
    send_delay: float

    @property
    def was_busy(self) -> bool:
        """Whether the event loop had no room for more."""
        return self.loop_cpu_share > MAX_LOOP_SHARE


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The figures of a run. Durations are in seconds. Rates are per second of the run."""

    setup: Setup
    begun: float
    """Seconds since the Unix epoch, by the clock of this machine."""
    seconds: float
    interrupted: bool
    calls_sent: int
    calls_succeeded: int
    calls_failed: int
    calls_per_second: float
    """Only successful calls."""
    prompt_tokens: int
    generated_tokens: int
    generated_tokens_per_second: float
    latencies: Mapping[str, Histogram]
    """By the names in `LATENCY_TITLES`."""
    errors: tuple[FailureCount, ...]
    """The most frequent first."""
    timeline: Mapping[str, Any]
    """The length of the intervals in seconds, and for each interval the calls that were due, the calls that failed, the tokens
    that arrived, and percentiles of the wait for the first answer (null without calls)."""
    bench: BenchUsage
    bench_limits: tuple[str, ...]
    """Why the bench was a limit of these figures; empty if it was not."""
    notes: tuple[str, ...]
    """What else a reader of the figures must know."""

    def as_json(self) -> dict[str, Any]:
        """Returns the report as values of JSON."""
        simple = {each.name: getattr(self, each.name) for each in fields(self)}
        return (
            {"format": FORMAT, "version": VERSION}
            | simple
            | {
                "setup": asdict(self.setup),
                "latencies": {name: histogram.as_json() for name, histogram in self.latencies.items()},
                "errors": [asdict(error) for error in self.errors],
                "bench": asdict(self.bench),
            }
        )

    @classmethod
    def from_json(cls, value: Any) -> Self:  # noqa: ANN401 - anything can be in a file
        """Returns the report that `as_json` has described; raises `KeyError`, `TypeError` or `ValueError` for other values."""
        if value["format"] != FORMAT or value["version"] != VERSION:
            raise ValueError("it has another format")
        known = {each.name: value[each.name] for each in fields(cls)}
        if not all(isinstance(known[name], int | float) for name in _COMPARED_FIGURES):
            raise TypeError("a figure is not a number")
        return cls(
            **known
            | {
                "setup": _known(Setup, value["setup"]),
                "latencies": {
                    name: Histogram.from_json(value["latencies"][name]) for name in LATENCY_TITLES if name in value["latencies"]
                },
                "errors": tuple(_known(FailureCount, error) for error in value["errors"]),
                "bench": _known(BenchUsage, value["bench"]),
                "bench_limits": tuple(map(str, value["bench_limits"])),
                "notes": tuple(map(str, value["notes"])),
            }
        )


_COMPARED_FIGURES: Final = ("calls_per_second", "generated_tokens_per_second", "calls_failed")
"""The figures besides latencies that a comparison shows."""


def _known(kind: type, value: Mapping[str, Any]) -> Any:  # noqa: ANN401 - an object of the class
    return kind(**{each.name: value[each.name] for each in fields(kind)})


def _finite(text: str) -> float:
    """Returns a number of a report. JSON has none for infinity and NaN, but Python reads them, and takes 1e999 for infinity."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a number of JSON")
    return value


def _int(text: str) -> int:
    """Returns a whole number of a report; raises `ValueError` if it is too large to calculate with."""
    _finite(text)
    return int(text)


def read_report(file: Path) -> Report:
    """Reads a report from a file; raises `ValueError` if it is not one."""
    with file.open("rb") as opened:
        content = opened.read(MAX_REPORT_BYTES)
    try:
        return Report.from_json(json.loads(content, parse_constant=_finite, parse_float=_finite, parse_int=_int))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError):
        raise ValueError(f"{file} is not a report of flywheel bench --json") from None


def load_in_words(plan: Plan) -> str:
    """Returns the load of a run for people."""
    if plan.concurrency is not None:
        return f"closed loop, {plan.concurrency} calls at a time"
    return f"open loop, {plan.rate:g} calls/s, {plan.arrivals} arrivals"


def report_of(outcome: Outcome, setup: Setup, plan: Plan, begun: float, notes: list[str]) -> Report:
    """Returns the report of a run."""
    measured, overhead = outcome.measurements, outcome.overhead
    per_second = 1 / outcome.seconds if outcome.seconds else 0.0
    errors = [
        FailureCount(code=code, reason=reason, count=it.count, message=it.message)
        for (code, reason), it in measured.errors.items()
    ]
    waits = measured.first_token if measured.first_token.count else measured.duration
    return Report(
        setup=setup,
        begun=begun,
        seconds=outcome.seconds,
        interrupted=outcome.interrupted,
        calls_sent=measured.sent,
        calls_succeeded=measured.succeeded,
        calls_failed=measured.failed,
        calls_per_second=measured.succeeded * per_second,
        prompt_tokens=measured.prompt_tokens,
        generated_tokens=measured.generated_tokens,
        generated_tokens_per_second=measured.generated_tokens * per_second,
        latencies=measured.latencies(),
        errors=tuple(sorted(errors, key=lambda error: -error.count)),
        timeline=_timeline_json(measured.timeline, outcome.seconds),
        bench=BenchUsage(
            loop_cpu_share=overhead.loop_cpu_share,
            cpu_share=overhead.cpu_share,
            loop_lag=overhead.lag.percentile(99),
            send_delay=measured.send_delay.percentile(99),
        ),
        # In a run without calls, the bench has only started and stopped.
        bench_limits=tuple(overhead.limits(measured.send_delay, waits, measured.inter_token, outcome.calls_waited))
        if measured.sent
        else (),
        notes=(*notes, *_notes(outcome, plan)),
    )


def _notes(outcome: Outcome, plan: Plan) -> list[str]:
    measured = outcome.measurements
    notes = []
    if outcome.interrupted:
        notes.append("The run was interrupted.")
    elif not measured.sent:
        notes.append(_no_call(plan))
    if outcome.reached_max_errors:
        notes.append(f"The run ended early, after {plan.max_errors} failed calls (--max-errors).")
    if outcome.unfinished:
        notes.append(
            f"{outcome.unfinished} calls had not ended when the run was over; the oldest took "
            f"{outcome.oldest_unfinished:.1f} s."
        )
    if measured.lower_bounds:
        notes.append(
            f"{measured.lower_bounds} calls were given up. They count with their time until then, so the true latencies are "
            "higher."
        )
    if outcome.calls_waited:
        notes.append(
            f"{outcome.calls_waited} calls were sent late, because {plan.max_in_flight} calls were in flight "
            "(--max-in-flight). Their latencies count from when they were due."
        )
    return notes


def _no_call(plan: Plan) -> str:
    """Returns why a run ended without a call, which only `Plan.duration` can cause."""
    if plan.rate is None:
        return "No call began within --duration."
    first = next(arrival_times(plan.rate, plan.arrivals))
    return f"No call was due within --duration: at this --rate, the first one is due after {first:,.1f} s."


def _timeline_json(timeline: Timeline, seconds: float) -> dict[str, Any]:
    timeline.coarsen()
    intervals = timeline.intervals
    waits = [each.waits if each.waits.count else None for each in intervals]
    return {
        "interval_seconds": timeline.interval_seconds,
        "seconds": seconds,
        "sent": [each.sent for each in intervals],
        "failed": [each.failed for each in intervals],
        "tokens": [each.tokens for each in intervals],
        "wait_p50": [each and each.percentile(50) for each in waits],
        "wait_p99": [each and each.percentile(99) for each in waits],
    }
