"""Starts the process of a server: sets up outputs that never block, reads the settings, and then imports and runs the server.

The server is imported last because that takes longest, and is not needed to print the help or to report wrong settings.
"""

import faulthandler
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

from flywheel_proto._extras import loading

from flywheel_server.engines.base import Engine
from flywheel_server.settings import Settings, parse
from flywheel_server.system import signals
from flywheel_server.system.output import Output, captured
from flywheel_server.system.signals import SignalReceiver


def main(receiver: SignalReceiver) -> None:
    """Serves until a signal stops the server, and exits; see `flywheel_server.__main__.main` for the exit codes."""
    with _outputs(receiver) as (stdout, stderr):
        settings = parse()
        with loading("flywheel-server"):
            from flywheel_server import serve_command
        exit_code = serve_command.run(settings, receiver, stdout, stderr)
    sys.exit(exit_code)


def run(engine: Engine, settings: Settings | None = None) -> int:
    """Serves an engine of your own as the command `flywheel-server` does, until a signal stops it.

    It heeds the same signals, drains, prints the ready line to standard output, and writes the log to standard error. Call it
    in the main thread before any other thread exists, because threads inherit which signals are blocked.

    Arguments:
        engine: The engine, not yet started.
        settings: The settings; by default the command line and the environment, as for the command. The settings that choose
            and configure an engine have no effect, and `workers` must be 1.

    Returns:
        The exit code for `sys.exit`: 1 if the server cannot start. The process exits with 1 if the engine dies for good, and
        with 2 if the settings are wrong.
    """
    receiver = SignalReceiver()
    with _outputs(receiver) as (stdout, stderr):
        settings = settings or parse()
        from flywheel_server import serve_command

        return serve_command.run(settings, receiver, stdout, stderr, engine)


def run_worker(pair: socket.socket, number: int, port: int, arguments: Sequence[str]) -> None:
    """Serves as one of several workers until the parent process stops it, and exits as `main` does.

    Arguments:
        pair: The socket to the parent.
        number: The number of this worker.
        port: The port that all workers listen on.
        arguments: The command line arguments of the parent.
    """
    with _outputs(None, f"worker {number}: ".encode()) as (_, stderr):
        settings = parse(arguments)
        host = settings.address.rpartition(":")[0]
        from flywheel_server import serve_command

        exit_code = serve_command.run_worker(settings.model_copy(update={"address": f"{host}:{port}"}), pair, number, stderr)
    sys.exit(exit_code)


@contextmanager
def _outputs(receiver: SignalReceiver | None, prefix: bytes = b"") -> Iterator[tuple[Output, Output]]:
    """Yields outputs for standard output and standard error that never block, and makes crashes write their stacks.

    Everything else that writes to standard error, such as gRPC and the interpreter, does not block either. Its lines get the
    prefix. A stop signal that ends the process while the outputs exist waits for their readers, as leaving the context does.
    """
    crash_log = _crash_log()
    faulthandler.enable(crash_log)
    signals.write_stacks_to(crash_log)
    stdout, stderr = Output(1), Output(2)

    def close() -> bool:
        stdout.close()
        return stderr.close()

    def exit_process() -> None:
        close()
        os._exit(0)

    with receiver.calling(exit_process) if receiver else nullcontext():
        try:
            with captured(2, lambda line: stderr.write(prefix + line)):
                yield stdout, stderr
        finally:
            if not close():
                # Nobody reads standard error, so a last message of the interpreter would block its exit.
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _crash_log() -> int:
    """Returns a descriptor for crash reports: standard error itself, which `captured` does not redirect.

    On Linux, the descriptor does not block if it is a pipe or a terminal, so that a crashing process ends even if nobody reads.
    """
    try:
        return os.open("/proc/self/fd/2", os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return os.dup(2)
