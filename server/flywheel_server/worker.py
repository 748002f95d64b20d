"""The program that a worker runs: `python -m flywheel_server.worker DESCRIPTOR NUMBER PORT SETTING…`.

DESCRIPTOR is the file descriptor of the socket to the parent. SETTING… are the parent's command-line flags. The worker also has
the parent's environment.
"""

import socket
import sys

from flywheel_server.system import signals


def main() -> None:
    """Serves until the parent stops it, or is gone. Exits with 1 if it cannot serve, or if the engine has died."""
    signals.leave_signals_to_parent()
    descriptor, number, port, *arguments = sys.argv[1:]
    from flywheel_server import launch

    launch.run_worker(socket.socket(fileno=int(descriptor)), int(number), int(port), arguments)


if __name__ == "__main__":
    main()
