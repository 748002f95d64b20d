"""Checks that the embedded engine goes on serving others while callers with a key attack it: `python -m fuzz.embedded`.

Each attack has a new server. The attackers have a key with a quota and a low priority. The well-behaved client has another key.
The measurements are those of `fuzz.abuse`. Besides, memory must stay within the bound of `docs/operations.md`.
"""

import argparse
import asyncio
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from flywheel_server.access.keys_file import KeyEntry, KeysFile, hash_of

from fuzz.calls import CALL_ATTACKS, CONCURRENCY, KEYS, CallAttack, unexpected_answers
from fuzz.probe import flywheel_server, print_row
from fuzz.under_attack import COST_HEADER, KEY, Cost, NotSurvivedError, cost_of

QUIET: Final = 1.5
"""Seconds in which the server is observed before the attack."""
CALL_INTERVAL: Final = 0.25
"""Seconds between two calls of the well-behaved client. The engine can answer a call in that time."""
MAX_CONCURRENT: Final = 4
"""The quota of each attacker: half of the engine's slots."""
PRIORITY: Final = -1
SETTINGS: Final = ("--engine=embedded", "--embedded-threads=1")
"""All other settings are the defaults. With two threads, the engine would nearly stop when attackers use the cores too."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Attacks, and prints a table. Exits with 1 if a server does not survive or recover, or takes too much memory."""
    attacks = {attack.name: attack for attack in CALL_ATTACKS}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="how long each attack lasts (default: 5)")
    parser.add_argument("--attack", action="append", choices=list(attacks), help="only this one; may be repeated")
    parser.add_argument("server_arguments", nargs="*", help="arguments of flywheel-server, after --")
    options = parser.parse_args(arguments)
    problems = []
    print_row(["attack on the embedded engine", "calls/s", *COST_HEADER])
    print_row(["---"] * (2 + len(COST_HEADER)))
    with TemporaryDirectory() as directory:
        keys = attackers_keys(Path(directory))
        for name in options.attack or attacks:
            attack = attacks[name]
            with flywheel_server(*SETTINGS, f"--api-keys-file={keys}", *options.server_arguments, api_key=KEY) as server:
                try:
                    cost = asyncio.run(
                        cost_of(attack, server, options.seconds, quiet_seconds=QUIET, call_interval=CALL_INTERVAL)
                    )
                except NotSurvivedError as error:
                    problems.append(f"{name}: {error}")
                    continue
            print_row([name, f"{cost.tally.sent / cost.seconds:,.0f}", *cost.cells()])
            problems += [f"{name}: {problem}" for problem in _problems(attack, cost)]
    if problems:
        sys.exit("\n".join(problems))


def attackers_keys(directory: Path) -> Path:
    """Writes the file with the keys of the attackers into the directory, and returns its path."""
    entries = (
        KeyEntry(
            name=f"attacker-{number}",
            hash=hash_of(key),
            created=datetime.now(UTC),
            priority=PRIORITY,
            max_concurrent=MAX_CONCURRENT,
        )
        for number, key in enumerate(KEYS, 1)
    )
    path = directory / "keys.json"
    KeysFile(keys=tuple(entries)).write(path)
    return path


def _problems(attack: CallAttack, cost: Cost) -> list[str]:
    """Returns the problems: the ways in which the server fell short."""
    problems = []
    # The bound of docs/operations.md: prompts in the tokenizer, and for each call 44 KiB, its text, and a message on its way.
    allowed = 400 + attack.callers * CONCURRENCY * (44 / 1024 + 1 + 4)
    growth = cost.attacked.resident - cost.quiet.resident
    if growth > allowed:
        problems.append(f"{growth:.0f} MiB more memory, and not {allowed:.0f} at most")
    if unexpected := unexpected_answers(cost.tally):
        problems.append(f"calls ended with {', '.join(unexpected)}")
    return problems


if __name__ == "__main__":
    main()
