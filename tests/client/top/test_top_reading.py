"""How samples become figures: rates, quantiles, sums of servers, restarts, and text that is not trusted."""

from __future__ import annotations

import random

import pytest
from flywheel_client._top.exposition import MAX_LABEL_CHARACTERS, MAX_LINE_CHARACTERS, MAX_LINES, read_samples, total
from flywheel_client._top.figures import figures_of
from flywheel_client._top.formats import bar, count, number, percent, quantile, seconds, sparkline
from flywheel_client._top.overview import overview
from flywheel_client._top.panels import PANELS, table_lines
from flywheel_client._top.rates import Interval, Quantile, interval, together
from flywheel_client._top.scraping import ScrapeError
from flywheel_client._top.servers import MAX_EVENTS, Events, History
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from tests.client.top.fake_metrics import HOSTILE
from tests.thorough import further

FIRST_TOKEN = "gen_ai_server_time_to_first_token_seconds"  # noqa: S105 - a metric


def scraped(registry: CollectorRegistry) -> bytes:
    return generate_latest(registry)


def between(before: bytes, after: bytes, length: float = 2.0) -> Interval:
    found = interval(read_samples(before), read_samples(after), length)
    assert found is not None
    return found


def test_rates_and_quantiles_are_of_the_interval_alone() -> None:
    registry = CollectorRegistry()
    tokens = Counter("flywheel_generated_tokens", "-", registry=registry)
    first = Histogram(FIRST_TOKEN, "-", registry=registry, buckets=(0.1, 0.2, 0.4))
    tokens.inc(1000)
    for _ in range(500):
        first.observe(0.05)
    before = scraped(registry)
    tokens.inc(50)
    for _ in range(10):
        first.observe(0.15)
    figures = figures_of(between(before, scraped(registry)))
    assert figures.generated_tokens_per_second == 25
    assert figures.first_token.p50
    assert figures.first_token.p99
    assert figures.first_token.p50.seconds == pytest.approx(0.15)
    assert figures.first_token.p99.seconds == pytest.approx(0.199)
    assert figures.queue_wait.p50 is None


def test_quantiles_are_right_to_a_bucket() -> None:
    values = random.Random(1)
    observed = sorted(values.lognormvariate(-2, 1) for _ in range(2000))
    registry = CollectorRegistry()
    first = Histogram(FIRST_TOKEN, "-", registry=registry, buckets=[0.01 * 1.2**power for power in range(40)])
    before = scraped(registry)
    for value in observed:
        first.observe(value)
    found = between(before, scraped(registry))
    for share in (0.5, 0.99):
        quantile_found = found.quantile(FIRST_TOKEN, share)
        assert quantile_found is not None
        assert quantile_found.seconds == pytest.approx(observed[int(share * 2000)], rel=0.2)


def test_a_quantile_above_all_bounds_says_so() -> None:
    text = f'{FIRST_TOKEN}_bucket{{le="1"}} 0\n{FIRST_TOKEN}_bucket{{le="+Inf"}} 3\n{FIRST_TOKEN}_count 3\n'.encode()
    found = between(b"flywheel_engine_up 1\n", text).quantile(FIRST_TOKEN, 0.5)
    assert found == Quantile(1.0, is_above=True)
    assert quantile(found) == ">1 s"


@pytest.mark.parametrize(
    "after", [b"flywheel_slow_readers_total 2\n", *further([b"flywheel_engine_up 1\n", b"flywheel_slow_readers_total -1\n"])]
)
def test_a_counter_that_falls_or_is_gone_is_a_restart(after: bytes) -> None:
    assert interval(read_samples(b"flywheel_slow_readers_total 3\n"), read_samples(after), 2.0) is None


def test_less_processor_time_is_no_restart() -> None:
    figures = figures_of(between(b"process_cpu_seconds_total 3\n", b"process_cpu_seconds_total 2\n"))
    assert figures.cpu == 0


def test_servers_are_added_up() -> None:
    one = between(b"flywheel_slow_readers_total 0\n", b"flywheel_slow_readers_total 4\nflywheel_engine_up 1\n")
    other = between(b"flywheel_slow_readers_total 0\n", b"flywheel_slow_readers_total 2\nflywheel_engine_up 0\n", 1.0)
    both = together([one, other])
    assert total(both.rates, "flywheel_slow_readers_total") == 4
    assert figures_of(both, 2).slow_readers == 6
    assert figures_of(both, 2).engine_up is False


REFUSED_TEXTS = {
    "empty": b"",
    "HTML": b"<html><body>hello</body></html>",
    "other metrics": b"go_goroutines 5\n",
    "a broken line": b"flywheel_engine_up one\n",
    "a label without end": b'flywheel_calls_refused_total{reason="\n',
    "too many lines": b"flywheel_engine_up 1\n" * (MAX_LINES + 1),
    "a line that is too long": b'flywheel_calls_refused_total{reason="%s"} 1\n' % (b"x" * MAX_LINE_CHARACTERS),
    "no text at all": bytes(range(256)) * 10,
}


@pytest.mark.parametrize("name", REFUSED_TEXTS)
def test_a_text_that_is_no_metrics_is_refused(name: str) -> None:
    with pytest.raises(ScrapeError):
        read_samples(REFUSED_TEXTS[name])


def test_labels_are_cut_and_have_no_control_characters() -> None:
    text = f'flywheel_caller_calls_total{{caller="{HOSTILE}{"y" * 500}\\n\t\r"}} 1\n'.encode()
    ((labels, _),) = read_samples(text)["flywheel_caller_calls_total"].items()
    name = dict(labels)["caller"]
    assert len(name) == MAX_LABEL_CHARACTERS
    assert name.isprintable()


WILD_NUMBERS = ("NaN", "+Inf", "-Inf", "1e308", "1.7e308", "5e-324", "-1", "0")


@pytest.mark.parametrize("width", [80, *further(range(1, 200, 13))])
def test_wild_numbers_neither_fail_nor_break_lines(width: int) -> None:
    names = ("calls_active", "max_concurrent", "context_tokens", "context_tokens_reserved", "engine_restarts_total")
    counters = ("flywheel_prompt_tokens_total", "flywheel_prompt_tokens_cached_total", f"{FIRST_TOKEN}_count")
    before = read_samples(b"flywheel_engine_up 1\n")
    for value in WILD_NUMBERS:
        lines = [f"flywheel_{name} {value}" for name in names] + [f"{name} {value}" for name in counters]
        lines += [f"process_start_time_seconds {value}", f"process_resident_memory_bytes {value}"]
        lines += [f'{FIRST_TOKEN}_bucket{{le="{bound}"}} {value}' for bound in ("NaN", "x", "-5", "1", "+Inf")]
        lines += [f'flywheel_caller_calls_total{{caller="{each}"}} {value}' for each in "ab"]
        found = interval(before, read_samples("\n".join(["flywheel_engine_up 1", *lines]).encode()), 1e-9)
        assert found is not None
        figures = figures_of(together([found, found]), 2)
        for lines_shown in (
            overview(figures, History(), width),
            *(table_lines(panel(figures, ()), width, 1) for panel in PANELS.values()),
        ):
            assert all(line.cell_len <= width and "\n" not in line.plain for line in lines_shown)


def test_numbers_are_short_and_round() -> None:
    assert [number(value) for value in (None, 0, 0.123, 12.34, 812, 1234, 12_345, 4_100_000)] == [
        *("-", "0", "0.12", "12.3", "812", "1234", "12.3k", "4.10M")
    ]
    assert [seconds(value) for value in (0.000_25, 0.021, 1.234, 75, 300, 7200, 864_000)] == [
        *("0.25 ms", "21 ms", "1.23 s", "75 s", "5 min", "2 h", "10 d")
    ]
    assert (count(2.0000001), percent(0.125), number(float("inf"))) == ("2", "12%", "?")
    assert all(len(number(10.0**power)) <= 8 for power in range(-20, 300))


def test_sparklines_and_bars_fill_their_width() -> None:
    assert sparkline([0, None, 4, 8], 6) == "  ▁ ▅█"
    assert sparkline(range(100), 8) == "████████"
    assert (sparkline([], 3), sparkline([1], 0), sparkline([0, 0], 2)) == ("   ", "", "▁▁")
    assert (bar(3, 4, 8), bar(9, 4, 4), bar(None, 4, 4), bar(1, 0, 4)) == ("██████░░", "████", "", "")


def test_an_event_that_happens_again_is_counted() -> None:
    events = Events()
    events.add("a", "lost", 2)
    events.add("b", "lost")
    events.add("a", "lost")
    assert [(event.address, event.times) for event in events.of(None)] == [("a", 3), ("b", 1)]
    for index in range(2 * MAX_EVENTS):
        events.add("c", str(index))
    assert len(events.of("c")) == MAX_EVENTS
    assert events.of("a") == []
