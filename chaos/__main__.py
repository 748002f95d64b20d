"""Calls a deployment while scenarios disrupt it, one after the other, and prints a table of the calls' outcomes.

    python -m chaos [NAME …] [--streams 64] [--cancels 4000] [--seconds 600]

Each NAME is the name of a scenario, or the beginning of a name; `--list` prints all names. Exits with 1 if a promise is broken.
"""

import argparse
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from chaos.load import Outcome
from chaos.scenarios import Scenario, scenarios
from chaos.stage import NotInTimeError, Stage, stage
from chaos.verdict import Times, broken_promises

RECOVERY_TIMEOUT: Final = 30.0
"""Seconds after the last call within which Modal must have no calls, and then seconds to become healthy."""
CALLS_TIMEOUT: Final = 45.0
"""Seconds within which running calls must end."""


@dataclass(frozen=True, slots=True)
class Row:
    """The result of a scenario: a row of the table.

    Attributes:
        name: The name of the scenario.
        outcomes: The outcomes of the calls.
        rpcs: Number of RPCs to Modal.
        affected_rpcs: Number of RPCs that were delayed, throttled or refused.
        remaining_calls: Number of calls that Modal still had `settle_seconds` after the last call ended.
        settle_seconds: Seconds until Modal had no calls, or until waiting for that ended.
        broken_promises: The promises that were broken, each with an example.
    """

    name: str
    outcomes: Sequence[Outcome]
    rpcs: int
    affected_rpcs: int
    remaining_calls: int
    settle_seconds: float
    broken_promises: Sequence[str]

    def __str__(self) -> str:
        finished = [outcome.ended - outcome.begun for outcome in self.outcomes if outcome.status == "OK"]
        stopped = sum(outcome.as_planned for outcome in self.outcomes if outcome.end != "finish")
        others = Counter(outcome.status for outcome in self.outcomes if not outcome.as_planned)
        verdict = "BROKEN" if self.broken_promises else "ok"
        other_statuses = ", ".join(f"{count} {status}" for status, count in others.most_common()) or "-"
        return (
            f"{self.name:<34} {len(self.outcomes):>6} {len(finished):>6} {stopped:>7} {max(finished, default=0):>7.1f} "
            f"{self.rpcs:>7} {self.affected_rpcs:>8} {self.remaining_calls:>5} {self.settle_seconds:>6.1f}  {verdict:<7} "
            f"{other_statuses}"
        )


HEADER: Final = (
    f"{'scenario':<34} {'calls':>6} {'OK':>6} {'stopped':>7} {'slowest':>7} {'RPCs':>7} {'affected':>8} {'left':>5} "
    f"{'after':>6}  {'':<7} other statuses"
)
LEGEND: Final = (
    "stopped: calls that were cancelled or reached a short deadline, as planned; slowest: seconds of the slowest OK call; "
    "affected: RPCs that were delayed, throttled or refused; "
    "left: calls that Modal still has after the last call ended; after: seconds until then."
)


def play(stage: Stage, scenario: Scenario, streams: int) -> Row:
    """Runs a scenario, and then restores the deployment."""
    rpcs = stage.cloud.rpcs.total()
    promises: list[str] = []
    outcomes: list[Outcome] = []
    load = replace(stage.load(), streams=streams, **scenario.load)
    try:
        scenario.prepare(stage)
        with stage.callers(load, scenario.clock) as callers:
            outcomes = callers.outcomes
            if "calls" not in scenario.load:
                callers.wait_for_answers()
            begun = time.monotonic()
            try:
                scenario.disrupt(stage)
            except (NotInTimeError, AssertionError, TimeoutError) as error:  # the outcomes of the calls are checked anyway
                promises.append(str(error))
            times = Times(begun, time.monotonic())
            if "calls" in scenario.load:
                callers.wait(load.seconds + CALLS_TIMEOUT)
            else:
                time.sleep(scenario.calm_after)
                callers.finish(CALLS_TIMEOUT)
        promises += broken_promises(outcomes, times, scenario.cost)
    except (NotInTimeError, AssertionError, TimeoutError) as error:
        promises.append(f"{type(error).__name__}: {error}")
    affected = stage.end_disruptions()
    ended = time.monotonic()
    remaining = 0
    try:
        stage.wait_until_no_calls(RECOVERY_TIMEOUT)
    except NotInTimeError as error:
        remaining = stage.remaining_calls()
        promises.append(f"Modal still has {remaining} calls although their callers have gone ({error})")
    settle_seconds = time.monotonic() - ended
    try:
        stage.wait_until_healthy(RECOVERY_TIMEOUT)
    except NotInTimeError as error:
        promises.append(f"the deployment has not recovered: {error}")
    row = Row(scenario.name, outcomes, stage.cloud.rpcs.total() - rpcs, affected, remaining, settle_seconds, promises)
    if promises or scenario.rebuild:
        stage.rebuild()
    return row


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the chosen scenarios, and prints a table."""
    parser = argparse.ArgumentParser(prog="python -m chaos", description="Calls a deployment while scenarios disrupt it.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="names of scenarios, or beginnings of names; default: all")
    parser.add_argument("--list", action="store_true", help="print the names of all scenarios")
    parser.add_argument("--streams", type=int, default=64, help="concurrent calls; default: 64")
    parser.add_argument("--cancels", type=int, default=4000, help="calls in the scenario 'cancels'; default: 4000")
    parser.add_argument("--seconds", type=float, default=600, help="seconds after which no new scenario starts; default: 600")
    arguments = parser.parse_args(argv)
    chosen = [
        scenario
        for scenario in scenarios(arguments.cancels)
        if not arguments.names or any(scenario.name.startswith(name) for name in arguments.names)
    ]
    if not chosen:
        parser.error("there is no such scenario; --list prints all")
    if arguments.list:
        print(*(scenario.name for scenario in chosen), sep="\n")
        return
    # On SIGTERM too, the containers, which are processes, must be ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    sys.exit(not _play_all(chosen, arguments.streams, time.monotonic() + arguments.seconds))


def _play_all(chosen: Sequence[Scenario], streams: int, until: float) -> bool:
    """Runs the scenarios, prints the table, and returns whether all promises were kept."""
    failed: list[Row] = []
    with tempfile.TemporaryDirectory() as directory, stage(Path(directory)) as deployment:
        print(HEADER, flush=True)
        for number, scenario in enumerate(chosen):
            if time.monotonic() >= until:
                print(f"There was no time for {', '.join(each.name for each in chosen[number:])}.")
                return False
            row = play(deployment, scenario, streams)
            print(row, flush=True)
            if row.broken_promises:
                failed.append(row)
    print(LEGEND)
    for row in failed:
        print(f"\n{row.name}")
        for promise in row.broken_promises:
            print(f"  {promise}")
    return not failed


if __name__ == "__main__":
    main()
