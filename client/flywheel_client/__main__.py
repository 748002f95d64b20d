"""The command `flywheel`, also `python -m flywheel_client`."""

import os
import sys
from typing import Final

INTERRUPTED: Final = 130


def main() -> None:
    """Runs the command and exits with its code."""
    # The command reports what goes wrong in its own words; grpc's log would come between them.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        from flywheel_client._cli import app
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name in {"typer", "rich"}:
            sys.exit(f"flywheel: the command needs {error.name}; install it with: pip install 'flywheel-grpc[cli]'")
        sys.exit(f"flywheel: the installation is broken: {error}")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    app(prog_name="flywheel")


if __name__ == "__main__":
    main()
