"""Compares our server with others: `python -m benchmarks`, or `make bench`."""

import argparse
import resource
import signal
import sys
from pathlib import Path
from typing import Final

from benchmarks import building, peers, report
from benchmarks.peers import Peer
from benchmarks.runner import run_rounds
from benchmarks.scenarios import SCENARIOS

RESULTS_FOLDER: Final = building.ROOT / "benchmarks" / "results"
"""The results of complete runs, which are committed."""

PARTIAL_FOLDER: Final = building.BUILD_FOLDER / "results"
"""The results of all other runs."""

RUNS_FILE: Final = building.BUILD_FOLDER / "runs.jsonl"
"""The runs, one JSON line each."""


def main() -> None:
    """Builds the programs, measures, and writes the tables and plots."""
    arguments = _parse()
    _prepare_process()
    building.build()
    present = [peer for peer in arguments.peers if _is_present(peer)]
    scenarios = [scenario for scenario in SCENARIOS if scenario.name in arguments.scenarios]
    runs = []
    folder = arguments.output or PARTIAL_FOLDER
    try:
        with RUNS_FILE.open("w") as file:
            for run in run_rounds(present, scenarios, rounds=arguments.rounds, seconds=arguments.seconds):
                runs.append(run)
                print(run.as_json(), file=file, flush=True)
                print(f"round {run.round + 1} of {arguments.rounds}, {report.summary(run)}", flush=True)
        if not sys.argv[1:]:
            folder = RESULTS_FOLDER
    finally:
        # After an interruption too.
        if runs:
            folder.mkdir(parents=True, exist_ok=True)
            print(report.write(runs, present, scenarios, folder))
            print(f"These tables and the plots are in {folder}, their data is in {RUNS_FILE}.")


def _is_present(peer: Peer) -> bool:
    """Returns whether a peer can take part, and says why if it cannot."""
    problem = peer.problem()
    if problem:
        print(f"Without {peer.title}: {problem}.")
    return not problem


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    names = {"peers": list(peers.peers()), "scenarios": [scenario.name for scenario in SCENARIOS]}
    parser.add_argument("--rounds", type=int, default=5, help="runs of each scenario on each peer; default: 5")
    parser.add_argument("--seconds", type=float, default=1.5, help="measured seconds of a run; default: 1.5")
    parser.add_argument(
        "--peers",
        type=lambda text: [_peer(name) for name in text.split(",")],
        default=[_peer(name) for name in names["peers"]],
        help=f"some of {','.join(names['peers'])}; NAME@FOLDER runs another checkout of the project; default: all",
    )
    parser.add_argument(
        "--scenarios",
        type=lambda text: [_scenario(name) for name in text.split(",")],
        default=names["scenarios"],
        help=f"some of {','.join(names['scenarios'])}; default: all",
    )
    whole, partial = (folder.relative_to(building.ROOT) for folder in (RESULTS_FOLDER, PARTIAL_FOLDER))
    parser.add_argument(
        "--output",
        type=Path,
        help=f"the folder for the tables; default: {whole} if there are no options and the run is not interrupted, "
        f"else {partial}",
    )
    return parser.parse_args()


def _peer(name: str) -> Peer:
    try:
        return peers.peer(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _scenario(name: str) -> str:
    if name not in (scenario.name for scenario in SCENARIOS):
        raise argparse.ArgumentTypeError(f"there is no scenario {name!r}")
    return name


def _prepare_process() -> None:
    """Makes SIGTERM end the servers too, and raises the limit of open files for this process and its children."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    main()
