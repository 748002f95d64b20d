"""Reads the metrics that are shown from Prometheus' text format. What a server sends is not trusted."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Final

from flywheel_proto._visible import one_line, visible
from prometheus_client.parser import text_string_to_metric_families

from flywheel_client._top.scraping import ScrapeError

Labels = tuple[tuple[str, str], ...]
"""The labels of a sample, sorted by name."""

Samples = Mapping[str, Mapping[Labels, float]]
"""The values of samples, by the name of the sample and by its labels."""

HISTOGRAMS: Final = (
    "rpc_server_call_duration_seconds",
    "gen_ai_server_time_to_first_token_seconds",
    "gen_ai_server_time_per_output_token_seconds",
    "flywheel_queue_wait_seconds",
    "flywheel_event_loop_lag_seconds",
)
COUNTERS: Final = frozenset(
    {
        "flywheel_calls_refused_total",
        "flywheel_calls_failed_total",
        "flywheel_calls_cancelled_total",
        "flywheel_slow_readers_total",
        "flywheel_calls_drained_total",
        "flywheel_retries_asked_total",
        "flywheel_engine_restarts_total",
        "flywheel_prompt_tokens_total",
        "flywheel_generated_tokens_total",
        "flywheel_prompt_tokens_cached_total",
        "flywheel_caller_calls_total",
        "flywheel_caller_tokens_total",
        "flywheel_log_lines_dropped_total",
        "process_cpu_seconds_total",
        *(f"{name}_{part}" for name in HISTOGRAMS for part in ("bucket", "count")),
    }
)
GAUGES: Final = frozenset(
    {
        "flywheel_calls_active",
        "flywheel_calls_queued",
        "flywheel_samples_active",
        "flywheel_samples_queued",
        "flywheel_max_concurrent",
        "flywheel_max_queued",
        "flywheel_context_tokens_reserved",
        "flywheel_context_tokens",
        "flywheel_engine_up",
        "flywheel_engine_runners",
        "flywheel_engine_backlog",
        "flywheel_connections",
        "flywheel_build_info",
        "process_resident_memory_bytes",
        "process_start_time_seconds",
    }
)
_NAME: Final = re.compile(r"[a-z_]+")

MAX_LINES: Final = 20_000
"""The most samples that are read. A server with 100 callers and all methods has a tenth of it."""

MAX_LINE_CHARACTERS: Final = 2_000
MAX_LABEL_CHARACTERS: Final = 100


def read_samples(text: bytes) -> Samples:
    """Returns the samples that are shown, with labels that are safe on a terminal and numbers that are finite.

    Raises:
        ScrapeError: The text has none of them, too many, or is not in the format.
    """
    lines = [line for line in text.decode(errors="replace").split("\n") if _is_shown(line)]
    if not lines:
        raise ScrapeError("it has no metrics of Flywheel gRPC")
    if len(lines) > MAX_LINES or max(map(len, lines)) > MAX_LINE_CHARACTERS:
        raise ScrapeError("its metrics are too large")
    samples: dict[str, dict[Labels, float]] = {}
    try:
        for family in text_string_to_metric_families("\n".join(lines)):
            for sample in family.samples:
                if math.isfinite(sample.value) and sample.value >= 0:
                    samples.setdefault(sample.name, {})[_safe(sample.labels)] = sample.value
    except Exception:  # noqa: BLE001 - what the parser raises on text that is no metrics is not documented
        raise ScrapeError("its metrics cannot be read") from None
    return samples


def total(samples: Samples, name: str) -> float | None:
    """Returns the sum of the samples with this name; None if there is none."""
    found = samples.get(name)
    return sum(found.values()) if found else None


def by_label(samples: Samples, name: str, label: str) -> dict[str, float]:
    """Returns the sums of the samples with this name for each value of a label."""
    return {value: total(of_value, name) or 0.0 for value, of_value in split(samples, (name,), label).items()}


def split(samples: Samples, names: Iterable[str], label: str) -> dict[str, dict[str, dict[Labels, float]]]:
    """Returns the samples with these names, apart for each value of a label. Samples without the label are left out."""
    apart: dict[str, dict[str, dict[Labels, float]]] = {}
    for name in names:
        for labels, value in samples.get(name, {}).items():
            if (key := dict(labels).get(label)) is not None:
                apart.setdefault(key, {}).setdefault(name, {})[labels] = value
    return apart


def safe(text: str) -> str:
    """Returns text of a server, cut and without control characters, so that it cannot write to the terminal."""
    return one_line(visible(text.replace("\t", " ")))[:MAX_LABEL_CHARACTERS]


def _is_shown(line: str) -> bool:
    name = _NAME.match(line)
    return name is not None and (name[0] in COUNTERS or name[0] in GAUGES)


def _safe(labels: Mapping[str, str]) -> Labels:
    return tuple(sorted((safe(name), safe(value)) for name, value in labels.items()))


def added(several: Iterable[Samples]) -> Samples:
    """Returns the sums of the samples of several servers, by name and labels."""
    sums: dict[str, dict[Labels, float]] = {}
    for samples in several:
        for name, values in samples.items():
            of_name = sums.setdefault(name, {})
            for labels, value in values.items():
                of_name[labels] = of_name.get(labels, 0.0) + value
    return sums
