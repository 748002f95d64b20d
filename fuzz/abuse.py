"""Checks that the server goes on serving others while it is attacked over HTTP/2: `python -m fuzz.abuse`.

Each attack has a new server. Well-behaved clients call the server before the attack and during it: one client stays connected,
and others connect for each call. The ratio of the two times shows how much slower their calls become. The attackers run in a
process of their own, at a lower priority than the server and the clients: what they compute is no part of the attack.
"""

import argparse
import asyncio
import sys
from collections.abc import Sequence
from typing import Final

from fuzz.attacks import ATTACKS
from fuzz.probe import flywheel_server, print_row
from fuzz.under_attack import COST_HEADER, KEY, NotSurvivedError, cost_of

QUIET: Final = 1.0
"""Seconds in which the server is observed before the attack."""
ANSWERS: Final = ("GOAWAY", "RST_STREAM", "closed", "refused")


def main(arguments: Sequence[str] | None = None) -> None:
    """Attacks, and prints a table. Exits with 1 if a server does not survive or does not recover."""
    attacks = {attack.name: attack for attack in ATTACKS}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="how long each attack lasts (default: 3)")
    parser.add_argument("--attack", action="append", choices=list(attacks), help="only this one; may be repeated")
    parser.add_argument("server_arguments", nargs="*", help="arguments of flywheel-server, after --")
    options = parser.parse_args(arguments)
    problems = []
    print_row(["attack", "frames/s", "connections", *COST_HEADER])
    print_row(["---"] * (3 + len(COST_HEADER)))
    for name in options.attack or attacks:
        attack = attacks[name]
        api_key = KEY if attack.is_by_strangers else ""
        with flywheel_server("--engine", "scripted", *options.server_arguments, api_key=api_key) as server:
            try:
                cost = asyncio.run(cost_of(attack, server, options.seconds, quiet_seconds=QUIET))
            except NotSurvivedError as error:
                problems.append(f"{name}: {error}")
                continue
        tally = cost.tally
        print_row([name, f"{tally.sent / cost.seconds:,.0f}", str(tally.connections), *cost.cells(*ANSWERS)])
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
