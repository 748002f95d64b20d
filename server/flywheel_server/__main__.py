"""The command `flywheel-server`. Sets up signals first, because the rest takes longer to import."""

import sys

from flywheel_server.system import signals


def main() -> None:
    """Serves until a signal stops the server, or manages the server's keys.

    Exits with 1 if the server cannot be imported or started, or if the engine has died, and with 2 if the settings are wrong.
    """
    manages_keys = sys.argv[1:2] == ["keys"]
    if manages_keys:
        signals.exit_at_once()
    else:
        receiver = signals.SignalReceiver()
    from flywheel_proto._extras import loading
    from flywheel_proto._streams import standard_streams

    with standard_streams("flywheel-server"):
        if manages_keys:
            with loading("flywheel-server"):
                from flywheel_server.access import keys_command
            signals.exit_in_order()
            keys_command.main(sys.argv[2:])
        else:
            with loading("flywheel-server"):
                from flywheel_server import launch
            launch.main(receiver)


if __name__ == "__main__":
    main()
