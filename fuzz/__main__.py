"""Runs all parts, one after the other: `python -m fuzz`."""

import sys

from fuzz import abuse, coverage_guided, embedded, wire


def main() -> None:
    """Prints the tables of all parts. Exits with 1 if one has found a problem."""
    found = False
    for part in (coverage_guided, wire, abuse, embedded):
        try:
            part.main([])
        except SystemExit as ended:
            if ended.code:
                found = True
                print(ended.code, file=sys.stderr)
        print(flush=True)
    sys.exit(found)


if __name__ == "__main__":
    main()
