"""The figures of a server that are shown, computed from what happened between two scrapes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from flywheel_client._top.exposition import Samples, by_label, split, total
from flywheel_client._top.rates import Interval, Quantile

CALLS: Final = "rpc_server_call_duration_seconds"
METHOD: Final = "rpc_method"
CODE: Final = "rpc_response_status_code"
ENDED_BY_CALLER: Final = frozenset({"OK", "CANCELLED"})
"""The status codes of calls that did not fail."""


@dataclass(frozen=True)
class Latency:
    """Quantiles of a duration in seconds, of what ended in the interval; None if nothing did."""

    p50: Quantile | None
    p99: Quantile | None


@dataclass(frozen=True)
class CallerUsage:
    """What a caller uses. Rates are per second; totals count since the server began."""

    caller: str
    calls_per_second: float
    tokens_per_second: float
    calls: float
    tokens: float


@dataclass(frozen=True)
class MethodUse:
    """The calls of a method. Rates are per second."""

    method: str
    calls_per_second: float
    failed_per_second: float
    duration: Latency
    calls: float


@dataclass(frozen=True)
class EndedEarly:
    """Calls that were refused, cancelled or ended for another reason. The rate is per second."""

    what: str
    per_second: float
    calls: float


@dataclass(frozen=True)
class Figures:
    """The figures of one or several servers. A figure that the server does not have is None. Rates are per second."""

    version: str
    engine: str
    model: str
    started: float | None
    """When the process began, in seconds since the epoch."""
    calls_per_second: float | None
    failed_per_second: float | None
    generated_tokens_per_second: float | None
    prompt_tokens_per_second: float | None
    prompt_tokens_cached: float | None
    """The share of the prompt tokens in the interval that the engine had in its cache: 0 to 1."""
    first_token: Latency
    per_token: Latency
    queue_wait: Latency
    loop_lag: Latency
    active: float | None
    queued: float | None
    slots_active: float | None
    slots: float | None
    slots_queued: float | None
    queue_slots: float | None
    context_tokens_reserved: float | None
    context_tokens: float | None
    engine_up: bool | None
    engine_restarts: float | None
    runners: float | None
    backlog: float | None
    slow_readers: float | None
    connections: float | None
    log_lines_dropped: float | None
    cpu: float | None
    """Processor seconds per second."""
    memory_bytes: float | None
    callers: tuple[CallerUsage, ...]
    methods: tuple[MethodUse, ...]
    ended_early: tuple[EndedEarly, ...]


def figures_of(interval: Interval, servers: int = 1) -> Figures:
    """Returns the figures of an interval.

    Args:
        interval: The interval of one server, or the sum of the intervals of several.
        servers: How many servers these are.
    """
    latest, rates = interval.latest, interval.rates
    up, prompt = total(latest, "flywheel_engine_up"), total(rates, "flywheel_prompt_tokens_total")
    cached = total(rates, "flywheel_prompt_tokens_cached_total")
    calls_per_second = total(rates, f"{CALLS}_count")
    return Figures(
        version=_build(latest, "version"),
        engine=_build(latest, "engine"),
        model=_build(latest, "model"),
        started=total(latest, "process_start_time_seconds") if servers == 1 else None,
        calls_per_second=calls_per_second,
        failed_per_second=None if calls_per_second is None else _failed(rates),
        generated_tokens_per_second=total(rates, "flywheel_generated_tokens_total"),
        prompt_tokens_per_second=prompt,
        prompt_tokens_cached=min(cached / prompt, 1.0) if prompt and cached is not None else None,
        first_token=_latency(interval, "gen_ai_server_time_to_first_token_seconds"),
        per_token=_latency(interval, "gen_ai_server_time_per_output_token_seconds"),
        queue_wait=_latency(interval, "flywheel_queue_wait_seconds"),
        loop_lag=_latency(interval, "flywheel_event_loop_lag_seconds"),
        active=total(latest, "flywheel_calls_active"),
        queued=total(latest, "flywheel_calls_queued"),
        slots_active=total(latest, "flywheel_samples_active"),
        slots=total(latest, "flywheel_max_concurrent"),
        slots_queued=total(latest, "flywheel_samples_queued"),
        queue_slots=total(latest, "flywheel_max_queued"),
        context_tokens_reserved=total(latest, "flywheel_context_tokens_reserved"),
        context_tokens=total(latest, "flywheel_context_tokens"),
        engine_up=None if up is None else up >= servers,
        engine_restarts=total(latest, "flywheel_engine_restarts_total"),
        runners=total(latest, "flywheel_engine_runners"),
        backlog=total(latest, "flywheel_engine_backlog"),
        slow_readers=total(latest, "flywheel_slow_readers_total"),
        connections=total(latest, "flywheel_connections"),
        log_lines_dropped=total(latest, "flywheel_log_lines_dropped_total"),
        cpu=total(rates, "process_cpu_seconds_total"),
        memory_bytes=total(latest, "process_resident_memory_bytes"),
        callers=tuple(_callers(latest, rates)),
        methods=tuple(_methods(interval)),
        ended_early=tuple(_ended_early(latest, rates)),
    )


def short_method(method: str) -> str:
    """Returns the name of a method, without the package of its service, and without the service if it is the contract's."""
    return method.rpartition(".")[2].removeprefix("GenerationService/")


def _latency(interval: Interval, histogram: str) -> Latency:
    return Latency(interval.quantile(histogram, 0.5), interval.quantile(histogram, 0.99))


def _build(latest: Samples, label: str) -> str:
    """Returns what a server, or each of several, was built as."""
    return ", ".join(sorted({value for value in by_label(latest, "flywheel_build_info", label) if value}))


def _failed(samples: Samples) -> float:
    codes = by_label(samples, f"{CALLS}_count", CODE)
    return sum(value for code, value in codes.items() if code not in ENDED_BY_CALLER)


def _callers(latest: Samples, rates: Samples) -> Iterable[CallerUsage]:
    calls, tokens = "flywheel_caller_calls_total", "flywheel_caller_tokens_total"
    columns: list[Mapping[str, float]] = [
        by_label(samples, name, "caller")
        for samples, name in ((rates, calls), (rates, tokens), (latest, calls), (latest, tokens))
    ]
    for caller in sorted(set().union(*columns)):
        calls_rate, tokens_rate, all_calls, all_tokens = (column.get(caller, 0.0) for column in columns)
        yield CallerUsage(caller, calls_rate, tokens_rate, all_calls, all_tokens)


def _methods(interval: Interval) -> Iterable[MethodUse]:
    rates = split(interval.rates, (f"{CALLS}_count", f"{CALLS}_bucket"), METHOD)
    for method, calls in sorted(by_label(interval.latest, f"{CALLS}_count", METHOD).items()):
        of_method = Interval(interval.seconds, {}, rates.get(method, {}))
        calls_rate = total(of_method.rates, f"{CALLS}_count") or 0.0
        yield MethodUse(short_method(method), calls_rate, _failed(of_method.rates), _latency(of_method, CALLS), calls)


def _ended_early(latest: Samples, rates: Samples) -> Iterable[EndedEarly]:
    labelled = (
        ("refused", "flywheel_calls_refused_total", "reason"),
        ("failed", "flywheel_calls_failed_total", "reason"),
        ("cancelled in", "flywheel_calls_cancelled_total", "phase"),
        ("told to retry", "flywheel_retries_asked_total", "reason"),
    )
    for what, name, label in labelled:
        per_second = by_label(rates, name, label)
        for value, calls in sorted(by_label(latest, name, label).items()):
            yield EndedEarly(f"{what} {value}", per_second.get(value, 0.0), calls)
    for what, name in (("slow reader", "flywheel_slow_readers_total"), ("drained", "flywheel_calls_drained_total")):
        if (calls_in_all := total(latest, name)) is not None:
            yield EndedEarly(what, total(rates, name) or 0.0, calls_in_all)
