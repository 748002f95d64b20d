"""The parts of `flywheel bench` that need no server: histograms, requests, arrivals, the page, and its own overhead."""

import asyncio
import json
import random
import time
from dataclasses import replace
from html.parser import HTMLParser
from itertools import islice, takewhile
from pathlib import Path
from xml.etree import ElementTree

import pytest
from flywheel_client._bench.comparison import comparison_lines
from flywheel_client._bench.driver import Outcome, Plan
from flywheel_client._bench.histogram import Histogram
from flywheel_client._bench.html_report import html_page
from flywheel_client._bench.measurements import MAX_ERROR_KINDS, MAX_INTERVALS, MAX_SPARSE_INTERVALS, Measurements, Timeline
from flywheel_client._bench.overhead import Overhead, OverheadMeter
from flywheel_client._bench.report import Report, Setup, read_report, report_of
from flywheel_client._bench.schedule import arrival_times
from flywheel_client._bench.terminal_report import format_seconds, report_lines, verdict
from flywheel_client._bench.workload import BUILT_IN_PROMPTS, requests_of

HOSTILE = "</title><script>alert(1)</script><img src=x onerror=alert(1)>\x1b[2J\ud800"
PLAN = Plan(
    concurrency=8,
    rate=None,
    arrivals="poisson",
    requests=100,
    duration=None,
    max_in_flight=1,
    max_errors=None,
    drain_timeout=1.0,
)


def report(overhead: Overhead | None = None) -> Report:
    """Returns a report of a run with every part, and with hostile texts of a server."""
    measured = Measurements(sent=101, succeeded=100, generated_tokens=5000)
    numbers = random.Random(1)
    for number in range(100):
        wait = numbers.lognormvariate(-3, 0.5)
        for histogram in (measured.first_token, measured.inter_token, measured.duration):
            histogram.add(wait)
        measured.timeline.at(number / 10).waits.add(wait)
    measured.add_error("UNAVAILABLE", HOSTILE, HOSTILE, 1.0)
    setup = Setup(
        server=HOSTILE,
        model=HOSTILE,
        engine=HOSTILE,
        method="GenerateDeltas",
        load="closed loop",
        prompts=HOSTILE,
        connections=1,
        timeout=60.0,
        fields={"stop": (HOSTILE,)},
    )
    return report_of(Outcome(measured, overhead or Overhead(), seconds=10.0), setup, PLAN, 1.7e9, [HOSTILE])


def test_percentiles_are_within_half_a_percent() -> None:
    numbers = random.Random(1)
    values = sorted(numbers.lognormvariate(-4, 2) for _ in range(10_001))
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    for percent in (0, 1, 50, 90, 99, 99.9, 100):
        exact = values[max(-(-len(values) * percent // 100) - 1, 0).__int__()]
        assert histogram.percentile(percent) == pytest.approx(exact, rel=0.0051)
    assert histogram.mean == pytest.approx(sum(values) / len(values))
    assert sum(count for _, _, count in histogram.rows(10)) == len(values)
    again = Histogram.from_json(json.loads(json.dumps(histogram.as_json())))
    assert vars(again) == vars(histogram)


def test_a_histogram_of_one_value_or_none() -> None:
    histogram = Histogram()
    assert (histogram.percentile(99), histogram.mean, histogram.rows(10)) == (0.0, 0.0, [])
    histogram.add(0.0, 3)
    histogram.add(-1.0)
    assert (histogram.count, histogram.percentile(50), len(histogram.rows(10))) == (4, 1e-6, 1)


def test_a_timeline_of_any_length_has_few_intervals() -> None:
    timeline = Timeline()
    for second in range(1000):
        timeline.at(second + 0.5).tokens += 1
    assert MAX_INTERVALS / 2 <= len(timeline.intervals) <= MAX_INTERVALS
    assert sum(interval.tokens for interval in timeline.intervals) == 1000
    assert timeline.interval_seconds * MAX_INTERVALS >= 1000
    timeline.at(0).sent = 100
    timeline.coarsen()
    assert len(timeline.intervals) <= MAX_SPARSE_INTERVALS
    assert sum(interval.tokens for interval in timeline.intervals) == 1000


def test_a_server_cannot_make_up_endless_reasons() -> None:
    measured = Measurements()
    for number in range(1000):
        measured.add_error("UNKNOWN", str(number), "", 0.0)
    assert (len(measured.errors), measured.failed) == (MAX_ERROR_KINDS + 1, 1000)


def test_arrivals_have_the_rate() -> None:
    assert list(islice(arrival_times(4.0, "constant"), 3)) == [0.0, 0.25, 0.5]
    times = list(takewhile(lambda time: time < 1000, arrival_times(10.0, "poisson")))
    assert len(times) == pytest.approx(10_000, rel=0.05)
    assert times == list(islice(arrival_times(10.0, "poisson"), len(times)))


def test_prompts_are_lines_or_objects(tmp_path: Path) -> None:
    file = tmp_path / "prompts"
    file.write_bytes("\ufeffone\r\n\n {two}\u2028\n".encode())
    assert [request.text for request in requests_of(file, {"max_tokens": 3})] == ["one", " {two}\u2028"]
    file.write_text('\n{"text": "a", "max_tokens": 5, "logit_bias": {"7": -1}}\n{"prompt_token_ids": [1, 2]}\n')
    first, second = requests_of(file, {"max_tokens": 3, "seed": 4})
    assert (first.text, first.max_tokens, first.seed, dict(first.logit_bias)) == ("a", 5, 4, {7: -1.0})
    assert (list(second.prompt_token_ids), second.max_tokens) == ([1, 2], 3)
    assert len(requests_of(None, {"max_tokens": 3})) == len(BUILT_IN_PROMPTS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b" \n", "has no prompt"),
        (b"\xff", "is not UTF-8"),
        (b'{"text": "a"}\nb', "line 2: it is not a JSON object"),
        (b'{"max_tokens": 1}', "line 1: a prompt is required"),
        (b'{"text": "a", "temperatur": 1}', "line 1: temperatur is not a field"),
        (b'{"text": 1}', "line 1: text has the wrong type"),
        (b'{"text": "a", "logit_bias": {"x": 1}}', "line 1: invalid literal"),
    ],
)
def test_wrong_prompts_are_named_by_their_line(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "prompts"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        requests_of(file, {"max_tokens": 1})


class Page(HTMLParser):
    """Collects the elements, attributes and texts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: set[str] = set()
        self.attributes: set[str] = set()
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_has_no_scripts_and_needs_nothing_from_elsewhere() -> None:
    text = html_page(report())
    page = Page(text)
    assert not page.elements & {"script", "img", "link", "iframe", "object", "use", "image", "a"}
    assert not {name for name in page.attributes if name.startswith("on") or name in {"src", "href", "style"}}
    assert "default-src 'none'" in text
    assert any("<script>alert(1)</script>" in each for each in page.texts)
    plots = ["<svg" + part.partition("</svg>")[0] + "</svg>" for part in text.split("<svg")[1:]]
    assert len(plots) == 6
    for plot in plots:
        ElementTree.fromstring(plot)  # noqa: S314 - the bench has just made it


def test_a_report_survives_json() -> None:
    made = report()
    read = Report.from_json(json.loads(json.dumps(made.as_json())))
    assert list(report_lines(read, blocks=True)) == list(report_lines(made, blocks=True))
    lines = list(comparison_lines(read, read))
    assert "setup" not in lines[0]
    assert not any("better" in line or "worse" in line for line in lines)
    assert "#" in "".join(report_lines(made, blocks=False))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 400, "1" + "0" * 5000, '"5"', "null"])
def test_a_report_has_only_finite_numbers(tmp_path: Path, number: str) -> None:
    file, written = tmp_path / "report.json", json.dumps(report().as_json())
    file.write_text(written)
    assert read_report(file).calls_per_second == 10
    for figure in ('"calls_per_second": 10.0', '"calls_failed": 1'):
        assert figure in written
        name, _, _ = figure.partition(" ")
        file.write_text(written.replace(figure, f"{name} {number}"))
        with pytest.raises(ValueError, match="is not a report of flywheel bench --json"):
            read_report(file)


def test_a_change_from_zero_is_marked() -> None:
    made = report()
    none = replace(made, calls_failed=0, calls_per_second=0.0)
    some = replace(made, calls_failed=24, calls_per_second=2.0)
    for before, after, calls, failed in (
        (none, some, "0 2 from 0 better", "0 24 from 0 worse"),
        (some, none, "2 0 -100.0% worse", "24 0 -100.0% better"),
        (none, none, "0 0", "0 0"),
    ):
        rows = [" ".join(line.split()) for line in comparison_lines(before, after)]
        assert f"calls/s {calls}" in rows
        assert f"failed calls {failed}" in rows


def test_durations_are_shown_with_a_unit() -> None:
    shown = [format_seconds(seconds) for seconds in (1e-6, 0.0123456, 0.9994, 0.99951, 59.94, 12345.6)]
    assert shown == ["0.001 ms", "12.3 ms", "999 ms", "1 s", "59.9 s", "12346 s"]


async def test_a_bench_that_is_the_limit_says_so() -> None:
    async with OverheadMeter() as meter:
        for _ in range(3):
            await asyncio.sleep(0.02)
            time.sleep(0.05)  # noqa: ASYNC251 - the event loop is to be late
    assert meter.overhead.lag.max > 0.03
    fast, slow = Histogram(), Histogram()
    fast.add(0.01)
    slow.add(10.0)
    none = Histogram()
    assert meter.overhead.limits(none, fast, none, 0)
    assert not meter.overhead.limits(none, slow, none, 0)
    assert meter.overhead.limits(none, slow, fast, 0)
    assert Overhead().limits(slow, fast, none, 0)
    assert not Overhead().limits(slow, fast, none, calls_waited=1)
    assert "NOT THE SERVER" in verdict(report(Overhead(loop_cpu_share=0.9)))
    assert verdict(report()).startswith("The bench was not the limit.")
