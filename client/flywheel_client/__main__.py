"""The command `flywheel`, also `python -m flywheel_client`."""

import os

from flywheel_proto._interrupts import exit_on_interrupt

# Without this, an interrupt during an import would print a traceback.
exit_on_interrupt()


def main() -> None:
    """Runs the command and exits with its code."""
    from flywheel_proto._extras import loading
    from flywheel_proto._streams import standard_streams

    # The command reports errors itself. Lines of grpc's log would mix with them.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    with standard_streams("flywheel"):
        with loading("flywheel"):
            from flywheel_client._cli import app
        app(prog_name="flywheel")


if __name__ == "__main__":
    main()
