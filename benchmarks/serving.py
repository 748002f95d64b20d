"""Runs the measured servers: real commands, each in a process of its own."""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Final

from benchmarks.building import ROOT

STOP_TIMEOUT: Final = 10.0
"""Seconds that a server may take to end after SIGTERM. Then it is killed."""


@contextmanager
def started(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Iterator[tuple[int, str]]:
    """Runs a server for the length of the context, and gives its process id and its address.

    Arguments:
        command: The command line. The server must print a line with its address when it is ready.
        environment: All environment variables of the server. Default: the variables of this process.

    Raises:
        RuntimeError: The server does not start.
    """
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT, env=environment)
        with process:
            try:
                yield process.pid, _address(process.stdout, errors)
            finally:
                process.terminate()
                try:
                    process.wait(STOP_TIMEOUT)
                except subprocess.TimeoutExpired:
                    process.kill()


def _address(output: IO[str] | None, errors: IO[str]) -> str:
    line = output.readline() if output else ""
    address = re.search(r"[\d.]+:\d+", line)
    if address is None:
        errors.seek(0)
        raise RuntimeError(f"the server did not start: {line}{errors.read()}")
    return address[0]


@contextmanager
def flywheel_server(*arguments: str, environment: Mapping[str, str] | None = None) -> Iterator[str]:
    """Runs `flywheel-server` on a free port for the length of the context, and gives its address when it is ready.

    Arguments:
        arguments: Flags of the server.
        environment: All environment variables of the server. Default: the variables of this process.
    """
    command = [sys.executable, "-m", "flywheel_server", "--address", "127.0.0.1:0", "--log-level", "warning", *arguments]
    with started(command, environment) as (_, address):
        yield address
