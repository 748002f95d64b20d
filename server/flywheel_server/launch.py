"""Starts the server: outputs that never block, then the settings, and then what serves.

What serves takes longer to load than all that comes before it. The help and wrong settings do without it.
"""

import faulthandler
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from flywheel_proto._extras import loading

from flywheel_server.engines.base import Engine
from flywheel_server.settings import Settings, parse
from flywheel_server.system import signals
from flywheel_server.system.output import Output, captured
from flywheel_server.system.signals import StopSignals


def main(stop: StopSignals) -> None:
    """Serves until a signal stops it.

    Exits with 1 if it cannot be loaded or cannot start or the engine has died, and with 2 if the settings are wrong.
    """
    with _outputs() as (stdout, stderr):
        settings = parse()
        with loading("flywheel-server"):
            from flywheel_server import serve_command
        exit_code = serve_command.run(settings, stop, stdout, stderr)
    sys.exit(exit_code)


def run(engine: Engine, settings: Settings | None = None) -> int:
    """Serves an engine of your own as the command `flywheel-server` does, until a signal stops it.

    It heeds the same signals, drains, prints the ready line to standard output, and writes the log to standard error. Call it
    in the main thread before any other thread exists, because threads inherit which signals are blocked.

    Arguments:
        engine: The engine, not yet started.
        settings: The settings; by default they come from the command line and the environment, as those of the command do. The
            settings that choose and configure an engine have no effect, and `workers` must be 1.

    Returns:
        The exit code for `sys.exit`: 1 if the server cannot start. The process exits with 1 if the engine dies for good, and
        with 2 if the settings are wrong.
    """
    stop = StopSignals()
    with _outputs() as (stdout, stderr):
        settings = settings or parse()
        from flywheel_server import serve_command

        return serve_command.run(settings, stop, stdout, stderr, engine)


def work(pair: socket.socket, number: int, port: int, arguments: Sequence[str]) -> None:
    """Serves as one of several workers until the parent says otherwise. Exits as `main` does.

    Arguments:
        pair: Leads to the parent.
        number: Which worker this is.
        port: What all workers listen on.
        arguments: The flags of the parent.
    """
    with _outputs(f"worker {number}: ".encode()) as (_, stderr):
        settings = parse(arguments)
        host = settings.address.rpartition(":")[0]
        from flywheel_server import serve_command

        exit_code = serve_command.work(settings.model_copy(update={"address": f"{host}:{port}"}), pair, number, stderr)
    sys.exit(exit_code)


@contextmanager
def _outputs(prefix: bytes = b"") -> Iterator[tuple[Output, Output]]:
    """Gives standard output and standard error for the length of the context, and has crashes write their report.

    Whoever else writes to standard error, gRPC and the interpreter included, does not wait for the reader either; these lines
    get the prefix.
    """
    crash_log = _crash_log()
    faulthandler.enable(crash_log)
    signals.write_stacks_to(crash_log)
    stdout, stderr = Output(1), Output(2)
    try:
        with captured(2, lambda line: stderr.write(prefix + line)):
            yield stdout, stderr
    finally:
        stdout.close()
        if not stderr.close():
            # Nobody reads: what the interpreter may still have to say would keep it from ending.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _crash_log() -> int:
    """Returns a descriptor for what a crash has to say: standard error, past whatever captures it.

    On Linux it does not block if that is a pipe or a terminal. A process that crashes must end, whoever reads.
    """
    try:
        return os.open("/proc/self/fd/2", os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return os.dup(2)
