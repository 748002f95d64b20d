"""Everything, one after the other: `python -m fuzz`."""

import sys

from fuzz import abuse, coverage_guided, embedded, wire


def main() -> None:
    """Prints the tables of all parts; exits with 1 where one has found something."""
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
