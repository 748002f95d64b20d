"""What the benchmarks make of what was measured: figures, ratios, tables, and who takes part in what."""

import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks import __main__ as command
from benchmarks import building, figures, processes, report, runner
from benchmarks.peers import peer, peers
from benchmarks.plot import Bar, bar_chart
from benchmarks.runs import Run, interruption
from benchmarks.scenarios import SCENARIOS, TEXT, Scenario
from benchmarks.targets import TARGETS, Target

PACED = next(scenario for scenario in SCENARIOS if scenario.name == "paced-64")


def run(name: str, number: int, cpu_seconds: float, scenario: str = PACED.name, **load: Any) -> Run:
    seen: dict[str, Any] = {
        "began": f"2026-11-26T04:0{number}:00.000000Z",
        "calls": 64,
        "statuses": {"OK": 64},
        "wrong_texts": 0,
        "wrong_counts": 0,
        "tokens": 10_000,
        "messages": 5_000,
        "tokens_per_second": 3_200.0,
        "first_message_ms": {"p50": 21.0, "p99": 30.0},
        "gap_ms": {"p50": 20.0, "p99": 25.0},
        "client_cpu_seconds": 0.1,
    }
    return Run(name, scenario, number, seen | load, 1.0, cpu_seconds, 2**20, 2**20 + 64 * 20 * 2**10)


OURS = [run("ours", 0, 2.0), run("ours", 1, 1.0), run("ours", 2, 9.0)]
BARE = [run("bare", 0, 4.0), run("bare", 1, 0.5), run("bare", 2, 3.0)]


def test_a_figure_has_the_median_and_the_range_of_its_rounds() -> None:
    assert figures.spread(OURS, figures.cpu) == figures.Spread(200, 100, 900)
    assert figures.spread(OURS, figures.tokens_per_message) == figures.Spread(2, 2, 2)
    assert figures.spread([run("ours", 0, 1, gap_ms=None)], figures.GAP_P50) is None


def test_a_ratio_is_taken_within_each_round() -> None:
    # The ratio of the medians is 2/3. A round without a partner does not count.
    assert figures.ratio(OURS, BARE[::-1], figures.cpu) == figures.Spread(2, 0.5, 3)
    assert figures.ratio(OURS, BARE[2:], figures.cpu) == figures.Spread(3, 3, 3)
    assert figures.ratio(OURS, [], figures.cpu) is None


def test_whatever_is_wrong_with_a_call_counts_as_failed() -> None:
    wrong = run("ours", 0, 1, statuses={"OK": 60, "Canceled": 4}, wrong_texts=2, wrong_counts=1)
    assert figures.failures(wrong) == 7
    assert figures.failed_share(wrong) == 7 / 64


def test_memory_is_what_the_server_grew_by_for_each_stream() -> None:
    assert figures.memory(OURS[0], 64) == 20


@pytest.mark.parametrize(
    ("limit", "is_minimum", "is_met"), [(2.0, False, True), (1.9, False, False), (2.0, True, True), (2.1, True, False)]
)
def test_a_target_is_met_by_the_median_of_the_ratios(limit: float, is_minimum: bool, is_met: bool) -> None:
    target = Target("CPU", PACED.name, figures.cpu, limit, is_minimum, against="bare")
    reached = target.reached([*OURS, *BARE])
    assert reached == figures.Spread(2, 0.5, 3)
    assert target.is_met(reached) is is_met
    assert target.reached(BARE) is None


def test_each_target_names_a_scenario_and_servers_that_take_part_in_it() -> None:
    scenarios = {scenario.name: scenario for scenario in SCENARIOS}
    for target in TARGETS:
        for name in filter(None, (target.peer, target.against)):
            assert peers()[name].takes_part(scenarios[target.scenario]), target


def test_the_report_has_a_table_and_plots_of_what_was_measured(tmp_path: Path) -> None:
    measured = [peer("ours"), peer("bare"), peer("fastapi")]
    text = report.write([*OURS, *BARE], measured, SCENARIOS, tmp_path)
    assert (tmp_path / "speed.md").read_text() == text
    rows = [line.strip("| ").split(" | ") for line in text.partition("## paced-64")[2].splitlines() if line.startswith("|")]
    assert [row[:4] for row in rows] == [
        ["server", "CPU µs per delta", "ratio", "deltas/s"],
        ["---"] * 4,
        ["ours", "200 (100 to 900)", "", "3,200"],
        ["bare grpc.aio", "300 (50.0 to 400)", "2.00 (0.50 to 3.00)", "3,200"],
    ]
    assert "| CPU per delta ÷ FastAPI" not in text
    assert text.count("\n## ") == 1
    for plot in ("cpu.svg", "first.svg"):
        assert f"({plot})" in text
        shown = " ".join(ET.parse(tmp_path / plot).getroot().itertext())  # noqa: S314 - written above
        assert "paced-64" in shown
        assert "bare grpc.aio" in shown


@pytest.mark.parametrize(
    ("options", "is_interrupted", "written"),
    [("", False, "whole"), ("", True, "partial"), ("--rounds 1", False, "partial"), ("--output {asked}", True, "asked")],
)
def test_only_a_whole_run_replaces_the_committed_results(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: str, is_interrupted: bool, written: str
) -> None:
    def runs(*_: Any, **__: Any) -> Iterator[Run]:
        yield OURS[0]
        if is_interrupted:
            raise KeyboardInterrupt

    monkeypatch.setattr(building, "build", lambda: None)
    monkeypatch.setattr(building, "ROOT", tmp_path)
    monkeypatch.setattr(command, "run_rounds", runs)
    monkeypatch.setattr(command, "RUNS_FILE", tmp_path / "runs.jsonl")
    monkeypatch.setattr(command, "RESULTS_FOLDER", tmp_path / "whole")
    monkeypatch.setattr(command, "PARTIAL_FOLDER", tmp_path / "partial")
    monkeypatch.setattr(command, "_is_present", lambda _: True)
    monkeypatch.setattr(command, "_prepare_process", lambda: None)
    monkeypatch.setattr(sys, "argv", ["benchmarks", *options.format(asked=tmp_path / "asked").split()])
    with pytest.raises(KeyboardInterrupt) if is_interrupted else nullcontext():
        command.main()
    assert [folder.name for folder in tmp_path.iterdir() if folder.is_dir()] == [written]
    assert (tmp_path / written / "speed.md").read_text().startswith("# Speed")


def test_each_kind_of_scenario_has_a_table() -> None:
    for scenario in SCENARIOS:
        rows = report.table(scenario, [(peer("ours"), OURS), (peer("bare"), BARE)])
        header, separator, *cells = [line for line in rows if line.startswith("|")]
        assert {line.count("|") for line in (header, separator, *cells)} == {header.count("|")}
        assert len(cells) == 2


@pytest.mark.parametrize(
    ("value", "shown"), [(0, "0.00"), (1.234, "1.23"), (12.34, "12.3"), (123.4, "123"), (25_600, "25,600")]
)
def test_numbers_have_about_three_digits(value: float, shown: str) -> None:
    assert report.digits(value) == shown


def test_bars_are_as_long_as_their_values() -> None:
    drawn = bar_chart([("a <title>", [Bar("one", 1, 1, 1, "1"), Bar("two", 2, 1, 4, "2")]), ("none", [])])
    widths = [float(bar.attrib["width"]) for bar in ET.fromstring(drawn).iter() if bar.get("fill") == "steelblue"]  # noqa: S314
    assert len(widths) == 2
    assert widths[1] == pytest.approx(2 * widths[0], abs=0.1)


def test_a_long_prompt_is_judged_by_the_speed_of_each_stream_before_and_meanwhile() -> None:
    steady = [{"at": 0.1 * number, "tokens": 1} for number in range(1, 60)]
    halved = [message for message in steady if message["at"] <= 2 or round(10 * message["at"]) % 2]
    late = [message for message in steady if message["at"] > 2]
    seen = interruption([steady, halved, late], 1.05, 2.05, 4.05)
    assert seen.prompt_seconds == 2
    assert seen.kept == pytest.approx([1.0, 0.5], abs=0.06)

    over = interruption([steady], 5.0, 6.0, 8.0)
    assert over.kept == []
    assert figures.kept(run("embedded", 0, 1)) is None


def test_turns_begin_with_another_peer_each_round() -> None:
    three = [peer("ours"), peer("bare"), peer("fastapi")]
    firsts = [runner.rotated(three, number)[0].name for number in range(4)]
    assert firsts == ["ours", "bare", "fastapi", "ours"]
    assert set(map(id, runner.rotated(three, 2))) == set(map(id, three))
    assert runner.rotated([], 1) == []


def test_servers_of_models_and_of_scripts_are_not_compared() -> None:
    for scenario in SCENARIOS:
        names = {name for name, each in peers().items() if each.takes_part(scenario)}
        assert len(names) > 1, scenario
        assert names.isdisjoint({"embedded", "llama"}) is (scenario.kind != "model")


def test_a_paced_call_lasts_for_the_seconds_of_its_round() -> None:
    assert Scenario("", "paced", 1, rate=50, stagger=1).tokens(3) == 200
    assert Scenario("", "unary", 1, max_tokens=7).tokens(3) == 7
    assert len(TEXT) % 4 == 0
    assert TEXT.isascii()


def test_a_peer_of_another_checkout_is_run_by_its_environment(tmp_path: Path) -> None:
    there = peer(f"ours@{tmp_path}")
    assert there.command[0] == str(tmp_path / ".venv" / "bin" / "python")
    assert there.name == f"ours@{tmp_path}"
    assert "there is no" in there.problem()
    with pytest.raises(ValueError, match="no peer 'theirs'"):
        peer("theirs")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_cpu_time_of_a_process_includes_that_of_its_children() -> None:
    burn = "import time\nwhile time.process_time() < 0.2: pass\nprint('burnt', flush=True)\ninput()"
    parent = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {burn!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "burnt\n"
        seconds = processes.cpu_seconds(process.pid)
        assert 0.2 <= seconds < 2
        times = [psutil.Process(pid).cpu_times() for pid in processes.family(process.pid)]
        assert seconds == pytest.approx(sum(each.user + each.system for each in times), abs=0.1)
        assert len(processes.family(process.pid)) == 2
        assert processes.resident_bytes(process.pid) > processes.resident_bytes(processes.family(process.pid)[1])
        process.communicate("\n")
