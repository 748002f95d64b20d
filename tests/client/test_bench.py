"""`flywheel bench` measures what a server of known pace does, and counts what fails exactly."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from flywheel_server.engines.scripted import Script, ScriptedEngine
from google.rpc.error_details_pb2 import ErrorInfo
from grpc import StatusCode

from tests.client.benching import agreeing, bench, paced
from tests.client.command import FLYWHEEL, WAIT, environment, flywheel, on_terminal
from tests.serving import serving
from tests.thorough import further

if TYPE_CHECKING:
    from tests.client.conftest import FakeService


PROMPT_SECONDS = 1.0
TOKEN_SECONDS = 0.05
TOKENS = 12


async def test_latencies_of_a_scripted_engine_agree_with_its_pace(tmp_path: Path) -> None:
    # The engine makes the first token with the first or second step after it has read the prompt.
    first = PROMPT_SECONDS + 1.5 * TOKEN_SECONDS
    expected = {
        **{("first_token", percentile): first for percentile in ("p50", "p90")},
        **{("per_output_token", percentile): TOKEN_SECONDS for percentile in ("p50", "p90")},
        **{("duration", percentile): first + (TOKENS - 1) * TOKEN_SECONDS for percentile in ("p50", "p90")},
        **{("inter_token", figure): TOKEN_SECONDS for figure in ("p50", "mean")},
    }
    engine = ScriptedEngine(Script(prompt_delay=PROMPT_SECONDS, token_delay=TOKEN_SECONDS))
    async with serving(engine) as target:
        arguments = ["--concurrency", "10", "--requests", "10", "--max-tokens", str(TOKENS), "--samples", "2"]
        run = await agreeing(expected, lambda: bench(target.address, tmp_path / "a.json", *arguments))
    assert run.code == 0, run.stderr
    assert run.report["latencies"]["inter_token"]["count"] == 10 * 2 * (TOKENS - 1)
    assert (run.report["calls_succeeded"], run.report["generated_tokens"]) == (10, 10 * 2 * TOKENS)
    assert sum(run.report["timeline"]["tokens"]) == run.report["generated_tokens"]
    assert (run.report["setup"]["model"], run.report["setup"]["engine"]) == ("script", "scripted")
    assert "time to first token" in run.stdout


@pytest.mark.thorough
async def test_percentiles_of_known_waits_with_a_server_that_has_only_the_method(tmp_path: Path) -> None:
    waits = [0.5 + number / 100 for number in range(100)]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(map(str, waits)))
    expected = {("first_token", f"p{percentile}"): waits[percentile - 1] for percentile in (50, 90, 99)}
    async with paced() as (address, _):
        arguments = ["--prompts", str(prompts), "--rate", "100", "--arrivals", "constant", "--requests", "100"]
        run = await agreeing(expected, lambda: bench(address, tmp_path / "a.json", *arguments))
    assert run.code == 0, run.stderr
    assert sum(run.report["timeline"]["sent"]) == 100


@pytest.mark.parametrize("load", [["--rate", "50", "--arrivals", "constant"], *further([["--concurrency", "1"]])])
async def test_an_open_loop_shows_a_server_that_stalls(tmp_path: Path, load: list[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("0.001")
    async with paced() as (address, service):
        service.stalled_from, service.stalled_until = 0.5, 1.5
        arguments = ["--prompts", str(prompts), "--duration", "2", "--warm-up", "0", *load]
        run = await bench(address, tmp_path / "a.json", *arguments)
    if "--rate" in load:
        assert run.report["calls_succeeded"] == 100
        # Half of the calls are due while the server stalls. Their waits are evenly spread over one second.
        assert 0.6 < run.latency("first_token", "p90") < 2
        assert run.latency("first_token", "p99") > 0.9
    else:
        # A closed loop makes only one call in this time, so its percentiles do not show the stall.
        assert run.latency("first_token", "p90") < 0.3
        assert run.latency("first_token", "max") > 0.9


@pytest.mark.thorough
async def test_calls_that_are_not_sent_or_do_not_end_count_with_their_wait(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("100")
    arguments = ["--rate", "20", "--arrivals", "constant", "--duration", "1", "--max-in-flight", "5", "--drain-timeout", "0.5"]
    async with paced() as (address, service):
        run = await bench(address, tmp_path / "a.json", "--prompts", str(prompts), "--warm-up", "0", *arguments)
    assert (run.code, service.calls) == (1, 5)
    assert run.errors() == {("CANCELLED", "UNFINISHED"): 5, ("CANCELLED", "NOT_SENT"): 15}
    assert 0.95 < run.latency("first_token", "p50") < run.latency("first_token", "max") > 1.45
    assert "20 calls were given up" in run.stdout


@pytest.mark.parametrize("method", ["GenerateDeltas", *further(["Generate", "GenerateAll"])])
async def test_failed_calls_are_counted_by_reason(tmp_path: Path, method: str) -> None:
    prompts = tmp_path / "prompts.jsonl"
    fields = [
        {"text": "a"},
        {"text": "boom"},
        {"text": "b", "max_tokens": 0},
        {"messages": [["user", "boom"]], "num_samples": 2},
    ]
    prompts.write_text("\n".join(map(json.dumps, fields)) + "\n")
    async with serving(ScriptedEngine(Script(fail_on="boom", fail_after=2))) as target:
        arguments = ["--prompts", str(prompts), "--method", method, "--requests", "400", "--max-tokens", "4"]
        run = await bench(target.address, tmp_path / "a.json", *arguments)
    assert run.errors() == {("INTERNAL", "ENGINE_FAILED"): 200, ("INVALID_ARGUMENT", ""): 100}
    assert (run.code, run.report["calls_succeeded"], run.report["calls_failed"]) == (0, 100, 300)
    assert "200  INTERNAL ENGINE_FAILED: " in run.stdout
    assert ("first_token" in run.report["latencies"]) == (method == "GenerateDeltas")


def test_a_server_that_refuses_the_caller_gets_no_load(fake: FakeService) -> None:
    fake.refuses = True
    fake.fail(StatusCode.UNAUTHENTICATED, "no key", ErrorInfo(reason="API_KEY_MISSING", domain="flywheel.v1"))
    done = flywheel(fake, "bench")
    assert (done.returncode, done.stdout, fake.requests) == (1, b"", [])
    assert b"UNAUTHENTICATED: no key" in done.stderr


@pytest.mark.thorough
async def test_a_run_ends_after_so_many_failed_calls(tmp_path: Path) -> None:
    for load, most in ((["--concurrency", "2"], 11), (["--rate", "200"], 100)):
        async with serving(ScriptedEngine(Script(fail_in_queue=True, failure="overloaded"))) as target:
            run = await bench(target.address, tmp_path / "a.json", "--max-errors", "10", "--duration", "60", *load)
        assert (run.code, list(run.errors())) == (1, [("RESOURCE_EXHAUSTED", "OVERLOADED")])
        assert 10 <= run.report["calls_failed"] <= most
        assert "after 10 failed calls (--max-errors)" in run.stdout


async def test_a_call_that_passes_its_deadline_counts_with_its_wait(fake: FakeService, tmp_path: Path) -> None:
    fake.holds = True
    run = await bench(fake.address, tmp_path / "a.json", "--requests", "2", "--timeout", "0.5", "--warm-up", "0")
    assert list(run.errors().items()) == [(("DEADLINE_EXCEEDED", ""), 2)]
    assert run.latency("first_token", "min") >= 0.5
    assert "2 calls were given up" in run.stdout


async def test_a_call_without_all_its_samples_is_no_success(fake: FakeService, tmp_path: Path) -> None:
    run = await bench(fake.address, tmp_path / "a.json", "--requests", "3", "--samples", "2")
    assert run.errors() == {("OK", "INCOMPLETE"): 3}


def test_an_interrupt_ends_the_run_and_still_reports(fake: FakeService, tmp_path: Path) -> None:
    fake.hangs = True
    report = tmp_path / "a.json"
    command = [*FLYWHEEL, "bench", "--concurrency", "3", "--warm-up", "0", "--json", str(report)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment(fake)) as running:
        assert fake.called.wait(WAIT)
        running.send_signal(signal.SIGINT)
        stdout, _ = running.communicate(timeout=WAIT)
    assert running.returncode == 130
    assert b"The run was interrupted." in stdout
    assert b" calls had not ended when the run was over" in stdout
    made = json.loads(report.read_text())
    assert (made["interrupted"], made["calls_failed"]) == (True, 0)


def test_an_interrupt_during_the_warm_up_says_that_nothing_was_measured(fake: FakeService, tmp_path: Path) -> None:
    fake.hangs = True
    report = tmp_path / "a.json"
    command = [*FLYWHEEL, "bench", "--json", str(report)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(fake)) as running:
        assert fake.called.wait(WAIT)
        running.send_signal(signal.SIGINT)
        said = running.communicate(timeout=WAIT)
    assert running.returncode == 130
    assert said == (b"", b"flywheel: interrupted during the warm-up; nothing was measured\n")
    assert not report.exists()


def test_an_interrupt_before_the_run_says_that_nothing_was_measured(fake: FakeService) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = "{}:{}".format(*silent.getsockname())
        command = [*FLYWHEEL, "bench", "--address", address]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(fake)) as running:
            connected, _ = silent.accept()
            running.send_signal(signal.SIGINT)
            said = running.communicate(timeout=WAIT)
            connected.close()
    assert running.returncode == 130
    assert said == (b"", b"flywheel: interrupted before the run; nothing was measured\n")


def test_a_run_without_calls_blames_no_one(fake: FakeService, tmp_path: Path) -> None:
    report, page = tmp_path / "a.json", tmp_path / "a.html"
    arguments = ["--rate", "1e-9", "--duration", "1", "--warm-up", "0", "--json", str(report), "--html", str(page)]
    done = flywheel(fake, "bench", *arguments)
    assert (done.returncode, fake.requests) == (1, [])
    shown = " ".join(done.stdout.decode().split())
    assert "No call was due within --duration: at this --rate, the first one is due after 144," in shown
    assert "Nothing was measured, because no call was sent." in shown
    assert "THE BENCH" not in shown + page.read_text()
    assert json.loads(report.read_text())["bench_limits"] == []


@pytest.mark.thorough
def test_progress_is_shown_on_a_terminal_and_removed(fake: FakeService) -> None:
    written = on_terminal(fake, "bench", "--rate", "20", "--duration", "1").decode()
    lines, _, report = written.rpartition("\r")
    assert "[####" in lines
    assert "calls" in lines
    assert report.startswith("SmolLM2-135M (fake) at ")
    assert "\x1b" not in written


@pytest.mark.parametrize(
    "case",
    [
        (["--rate", "1", "--concurrency", "1"], "give --concurrency or --rate, not both"),
        *further(
            [
                (["--prompts", os.devnull], "has no prompt"),
                (["--compare", __file__, __file__], "is not a report of flywheel bench --json"),
                (["--duration", "1e9"], "Invalid value for '--duration'"),
            ]
        ),
    ],
)
def test_wrong_usage(fake: FakeService, case: tuple[list[str], str]) -> None:
    arguments, message = case
    done = flywheel(fake, "bench", *arguments)
    assert (done.returncode, fake.requests) == (2, [])
    assert message in done.stderr.decode()


@pytest.mark.parametrize("flag", ["--json", "--html"])
@pytest.mark.parametrize(("name", "problem"), [("no/a", "No such file or directory"), ("a" * 300, "File name too long")])
def test_a_report_file_that_cannot_be_written_costs_no_run(
    fake: FakeService, tmp_path: Path, flag: str, name: str, problem: str
) -> None:
    file = tmp_path / name
    done = flywheel(fake, "bench", flag, str(file))
    assert (done.returncode, fake.requests, fake.peers) == (2, [], set())
    assert done.stderr.decode() == f"flywheel: {flag}: cannot write {file}: {problem}\n"


def test_two_reports_in_one_file_are_refused(fake: FakeService, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    done = flywheel(fake, "bench", "--json", str(tmp_path / "a"), "--html", str(tmp_path / "b" / ".." / "a"))
    assert (done.returncode, fake.requests) == (2, [])
    assert done.stderr == b"flywheel: --json and --html must name different files\n"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /dev/full")
def test_a_report_that_cannot_be_written_after_the_run_is_shown_and_in_the_other_file(
    fake: FakeService, tmp_path: Path
) -> None:
    page = tmp_path / "a.html"
    done = flywheel(fake, "bench", "--requests", "3", "--json", "/dev/full", "--html", str(page))
    assert done.returncode == 1
    assert b"3 succeeded" in done.stdout
    assert done.stderr == b"flywheel: --json: cannot write /dev/full: No space left on device\n"
    assert "SmolLM2-135M" in page.read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /dev/full")
def test_a_report_that_cannot_be_printed_is_in_its_file(fake: FakeService, tmp_path: Path) -> None:
    report = tmp_path / "a.json"
    command = [*FLYWHEEL, "bench", "--requests", "3", "--json", str(report)]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(command, stdout=full, env=environment(fake), timeout=WAIT, check=False)
    assert done.returncode == 1
    assert json.loads(report.read_text())["calls_succeeded"] == 3


def test_the_report_on_stdout_and_the_page_with_several_connections(fake: FakeService, tmp_path: Path) -> None:
    page = tmp_path / "a.html"
    done = flywheel(fake, "bench", "--requests", "6", "--connections", "3", "--json", "-", "--html", str(page))
    assert json.loads(done.stdout)["calls_succeeded"] == 6
    # GetModel has a connection of its own.
    assert len(fake.peers) == 4
    assert "SmolLM2-135M" in page.read_text()


def test_two_reports_are_compared(fake: FakeService, tmp_path: Path) -> None:
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file, method in zip(files, ("GenerateDeltas", "Generate"), strict=True):
        assert flywheel(fake, "bench", "--requests", "5", "--method", method, "--json", str(file)).returncode == 0
    done = flywheel(fake, "bench", "--compare", *map(str, files))
    lines = done.stdout.decode().splitlines()
    assert lines[0] == "The runs differ in their setup:"
    assert ["method", "GenerateDeltas", "Generate"] in [line.split() for line in lines]
    assert any(line.startswith("call duration p99") for line in lines)
