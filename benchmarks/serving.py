"""The server under measurement: the real command, in a process of its own."""

import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


@contextmanager
def flywheel_server(*arguments: str, environment: Mapping[str, str] | None = None) -> Iterator[str]:
    """Runs `flywheel-server` with these arguments on a free port, and gives its address once it is ready.

    Arguments:
        arguments: Flags of the server.
        environment: All its variables. Default: those of this process.
    """
    command = [sys.executable, "-m", "flywheel_server", "--address", "127.0.0.1:0", "--log-level", "warning", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            line = process.stdout.readline() if process.stdout else ""
            address = re.search(r"[\d.]+:\d+", line)
            if address is None:
                raise RuntimeError(f"the server did not start: {line}")
            yield address[0]
        finally:
            process.terminate()
