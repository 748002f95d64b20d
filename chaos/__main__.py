"""Calls a deployment while it fails, in one way after the other, and prints what callers saw and what Modal was left with.

    python -m chaos [NAME …] [--streams 64] [--cancels 4000] [--seconds 600]

Each NAME is that of a scenario, or the beginning of one; `--list` prints them. Exits with 1 where a promise was broken.
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
from chaos.verdict import Times, broken

LEFT_WITHIN: Final = 30.0
"""Seconds after the last call within which Modal has none any more, and all is well again."""
CALLS_WITHIN: Final = 45.0
"""Seconds in which the calls that have begun must have ended."""


@dataclass(frozen=True, slots=True)
class Row:
    """What came of a scenario.

    Attributes:
        outcomes: Those of the calls.
        rpcs: How many RPCs Modal got in it.
        struck: How many of them were delayed, limited or refused.
        left: How many calls Modal had in the end, and after so many seconds (`settled`).
        broken: The promises that did not hold.
    """

    name: str
    outcomes: Sequence[Outcome]
    rpcs: int
    struck: int
    left: int
    settled: float
    broken: Sequence[str]

    def __str__(self) -> str:
        finished = [outcome.ended - outcome.begun for outcome in self.outcomes if outcome.status == "OK"]
        asked = sum(outcome.as_planned for outcome in self.outcomes if outcome.end != "finish")
        others = Counter(outcome.status for outcome in self.outcomes if not outcome.as_planned)
        verdict = "BROKEN" if self.broken else "ok"
        told = ", ".join(f"{count} {status}" for status, count in others.most_common()) or "-"
        return (
            f"{self.name:<34} {len(self.outcomes):>6} {len(finished):>6} {asked:>6} {max(finished, default=0):>7.1f} "
            f"{self.rpcs:>7} {self.struck:>6} {self.left:>4} {self.settled:>6.1f}  {verdict:<7} {told}"
        )


HEADER: Final = (
    f"{'scenario':<34} {'calls':>6} {'OK':>6} {'ended':>6} {'slowest':>7} {'RPCs':>7} {'struck':>6} {'left':>4} {'after':>6}  "
    f"{'':<7} other statuses"
)
LEGEND: Final = (
    "ended: cancelled or cut short by their callers, as planned; slowest: seconds of a call that was OK; "
    "struck: RPCs that were delayed, limited or refused; "
    "left: calls on Modal that nobody waits for, so many seconds after the last call ended."
)


def play(stage: Stage, scenario: Scenario, streams: int) -> Row:
    """Plays a scenario, and leaves the deployment as it was before."""
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
                scenario.befall(stage)
            except (NotInTimeError, AssertionError, TimeoutError) as error:  # the calls are looked at all the same
                promises.append(str(error))
            times = Times(begun, time.monotonic())
            if "calls" in scenario.load:
                callers.wait(load.seconds + CALLS_WITHIN)
            else:
                time.sleep(scenario.calm_after)
                callers.finish(CALLS_WITHIN)
        promises += broken(outcomes, times, scenario.cost)
    except (NotInTimeError, AssertionError, TimeoutError) as error:
        promises.append(f"{type(error).__name__}: {error}")
    struck = stage.calm()
    ended = time.monotonic()
    left = 0
    try:
        stage.wait_until_nothing_is_left(LEFT_WITHIN)
    except NotInTimeError as error:
        left = stage.left()
        promises.append(f"{left} calls go on that nobody waits for ({error})")
    settled = time.monotonic() - ended
    try:
        stage.wait_until_whole(LEFT_WITHIN)
    except NotInTimeError as error:
        promises.append(f"not as before: {error}")
    row = Row(scenario.name, outcomes, stage.cloud.rpcs.total() - rpcs, struck, left, settled, promises)
    if promises or scenario.rebuild:
        stage.rebuild()
    return row


def main(argv: Sequence[str] | None = None) -> None:
    """Plays the scenarios that are chosen, and prints a table."""
    parser = argparse.ArgumentParser(prog="python -m chaos", description="Calls a deployment while it fails.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="scenarios, or the beginnings of their names; default: all")
    parser.add_argument("--list", action="store_true", help="print the names of all scenarios")
    parser.add_argument("--streams", type=int, default=64, help="calls at a time; default: 64")
    parser.add_argument("--cancels", type=int, default=4000, help="calls that the scenario 'cancels' cancels; default: 4000")
    parser.add_argument("--seconds", type=float, default=600, help="after which no further scenario begins; default: 600")
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
    # The containers, which are processes of their own, have to be ended whatever ends this one.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    sys.exit(not _play_all(chosen, arguments.streams, time.monotonic() + arguments.seconds))


def _play_all(chosen: Sequence[Scenario], streams: int, until: float) -> bool:
    """Prints the table; returns whether all promises held."""
    failed: list[Row] = []
    with tempfile.TemporaryDirectory() as directory, stage(Path(directory)) as deployment:
        print(HEADER, flush=True)
        for number, scenario in enumerate(chosen):
            if time.monotonic() >= until:
                print(f"There was no time for {', '.join(each.name for each in chosen[number:])}.")
                return False
            row = play(deployment, scenario, streams)
            print(row, flush=True)
            if row.broken:
                failed.append(row)
    print(LEGEND)
    for row in failed:
        print(f"\n{row.name}")
        for promise in row.broken:
            print(f"  {promise}")
    return not failed


if __name__ == "__main__":
    main()
