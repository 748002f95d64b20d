"""The command `flywheel`, also `python -m flywheel_client`."""

import os

from flywheel_proto._interrupts import exit_on_interrupt

# Python would raise KeyboardInterrupt in the middle of an import, and print where.
exit_on_interrupt()


def main() -> None:
    """Runs the command and exits with its code."""
    from flywheel_proto._extras import loading
    from flywheel_proto._streams import standard_streams

    # The command reports what goes wrong in its own words; grpc's log would come between them.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    with standard_streams("flywheel"):
        with loading("flywheel"):
            from flywheel_client._cli import app
        app(prog_name="flywheel")


if __name__ == "__main__":
    main()
