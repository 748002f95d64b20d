"""The command `flywheel`, also `python -m flywheel_client`."""

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType

from flywheel_proto._streams import INTERRUPTED, standard_streams


def _on_interrupt(handler: Callable[[int, FrameType | None], object]) -> None:
    """Handles SIGINT, unless whoever started the command has it ignored, as shells do for what runs in the background."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, handler)


def _exit_at_once(number: int, frame: FrameType | None) -> None:
    del number, frame
    os._exit(INTERRUPTED)


# Python would raise KeyboardInterrupt in the middle of an import, and print where.
_on_interrupt(_exit_at_once)


def main() -> None:
    """Runs the command and exits with its code."""
    # The command reports what goes wrong in its own words; grpc's log would come between them.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    with standard_streams("flywheel"):
        try:
            from flywheel_client._cli import app
        except ImportError as error:
            if isinstance(error, ModuleNotFoundError) and error.name in {"typer", "rich"}:
                sys.exit(f"flywheel: the command needs {error.name}; install it with: pip install 'flywheel-grpc[cli]'")
            sys.exit(f"flywheel: the installation is broken: {error}")
        try:
            _on_interrupt(signal.default_int_handler)
            app(prog_name="flywheel")
        finally:
            _on_interrupt(_exit_at_once)


if __name__ == "__main__":
    main()
