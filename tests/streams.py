"""Both commands with each standard stream in each state that it may be in; `python -m tests.streams` prints what they do.

The commands run as a user runs them, as processes of their own.
"""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from grpc_health.v1 import health_pb2

from tests.client.conftest import SERVICE, FakeService, serving_fake, watchable
from tests.serving import free_ports

WAIT: Final = 60.0

STATES: Final = {
    "stdin": {"closed": "<&-", "write-only": "0>/dev/null"},
    "stdout": {"closed": ">&-", "full": ">/dev/full", "gone": "", "read-only": "1</dev/null", "ASCII": "", "latin-1": ""},
    "stderr": {"closed": "2>&-", "full": "2>/dev/full", "gone": "", "read-only": "2</dev/null", "ASCII": ""},
    "all": {"closed": "<&- >&- 2>&-"},
}
"""How a shell brings each stream into each state. The rest is done without a shell."""

ENCODINGS: Final = {
    "ASCII": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
}

PROBLEMS: Final = {
    "closed": "Bad file descriptor",
    "read-only": "Bad file descriptor",
    "write-only": "Bad file descriptor",
    "full": "No space left on device",
}
"""What the system says of each state."""

MODEL: Final = "Übermodell-日本"
DELTAS: Final = "Größe 日本"


@dataclass(frozen=True)
class Command:
    """A command line, and what it does while all is well."""

    program: str
    arguments: tuple[str, ...]
    exit_code: int = 0
    prints: bool = True
    reads: bool = False
    setup: tuple[str, ...] = ()
    """What is run before, with the same program."""

    def __str__(self) -> str:
        return " ".join(("flywheel" if self.program == "flywheel_client" else "flywheel-server", *self.arguments))


@dataclass(frozen=True)
class Ran:
    """How a command ended, and what it wrote while it could."""

    exit_code: int
    out: str
    err: str


def _client(*arguments: str, exit_code: int = 0, prints: bool = True, reads: bool = False) -> Command:
    return Command("flywheel_client", arguments, exit_code, prints, reads)


def _server(*arguments: str, exit_code: int = 0, prints: bool = True, setup: tuple[str, ...] = ()) -> Command:
    return Command("flywheel_server", arguments, exit_code, prints, setup=setup)


FILE: Final = ("--file", "keys.json")
CREATE: Final = ("keys", "create", "team-a", *FILE)
COMMANDS: Final = (
    _client("--help"),
    _client("--version"),
    _client("generate", "--help"),
    _client("generate", "a prompt"),
    _client("generate", reads=True),
    _client("generate", "a prompt", "--samples", "2"),
    _client("generate", "a prompt", "--json"),
    *(_client(name, *more) for name in ("health", "model") for more in ((), ("--json",))),
    _client("endpoints", exit_code=1, prints=False),
    _client("stats", "--wröng", exit_code=2, prints=False),
    _client("wröng", exit_code=2, prints=False),
    _client("generate", "a prompt", "--max-tokens", "9999999999", exit_code=2, prints=False),
    _server("--help"),
    _server("--version"),
    _server("--wröng", exit_code=2, prints=False),
    _server("--port", "wröng", exit_code=2, prints=False),
    _server("--max-queued", "wröng", exit_code=2, prints=False),
    _server("keys", "--help"),
    _server(*CREATE),
    _server("keys", "list", *FILE, setup=CREATE),
    _server("keys", "list", "--json", *FILE, setup=CREATE),
    _server("keys", "revoke", "team-a", *FILE, prints=False, setup=CREATE),
    _server("keys", "revoke", "wröng", *FILE, exit_code=1, prints=False, setup=CREATE),
)
SERVE: Final = _server("--engine", "scripted", "--withdraw-window", "0")


def expected(command: Command, stream: str, state: str) -> tuple[int, str]:
    """Returns the exit code that is right, and what standard error has to say if it can be written."""
    fails = stream == "all" or (stream == "stdout" and command.prints) or (stream == "stdin" and command.reads)
    if command.exit_code == 0 and command is not SERVE and fails:
        if state == "gone":
            return 141, ""
        if state in PROBLEMS and (stream != "all" or command.prints):
            problem = "read standard input" if stream == "stdin" else "write to standard output"
            return 1, f"cannot {problem}: {PROBLEMS[state]}\n"
    return command.exit_code, ""


@contextmanager
def serving_text() -> Iterator[FakeService]:
    """Serves text that is not ASCII."""
    health = watchable()
    for name in ("", SERVICE):
        health.set(name, health_pb2.HealthCheckResponse.SERVING)
    with serving_fake(health) as fake:
        fake.model_name = MODEL
        fake.deltas[0].text = fake.samples[0].text = DELTAS
        yield fake


def run(command: Command, stream: str, state: str, address: str, folder: Path) -> Ran:
    """Runs the command in a folder of its own while a server is at the address."""
    module = [sys.executable, "-m", command.program]
    environment = os.environ | {"FLYWHEEL_ADDRESS": address, "COLUMNS": "80"} | ENCODINGS.get(state, {})
    if command.setup:
        subprocess.run([*module, *command.setup], cwd=folder, env=environment, capture_output=True, check=True)
    arguments = command.arguments
    if command is SERVE:
        address = f"127.0.0.1:{free_ports(1)[0]}"
        arguments += ("--address", address)
    files = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with _gone_reader() as gone:
        if state == "gone":
            files[stream] = gone
        shell = ["sh", "-c", f'exec "$@" {STATES[stream][state]}', "sh"]
        with subprocess.Popen([*shell, *module, *arguments], cwd=folder, env=environment, **files) as process:  # type: ignore[call-overload]
            if command is SERVE:
                # This waits for the server.
                subprocess.run(
                    [sys.executable, "-m", "flywheel_client", "health", "--address", address, "--wait-for-ready"],
                    stdout=subprocess.DEVNULL,
                    check=True,
                )
                process.send_signal(signal.SIGTERM)
            out, err = process.communicate(b"a prompt" if command.reads else None, timeout=WAIT)
    encoding = {"ASCII": "ascii", "latin-1": "latin-1"}.get(state, "utf-8")
    return Ran(process.returncode, (out or b"").decode(encoding), (err or b"").decode(encoding))


@contextmanager
def _gone_reader() -> Iterator[int]:
    """Gives the end of a pipe that nobody reads any more."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        yield writing
    finally:
        os.close(writing)


def main() -> None:
    """Prints a table: for each command and each state of a stream the exit code, and the last line of standard error."""
    states = [(stream, state) for stream in STATES for state in STATES[stream]]
    print("| command |", " | ".join(f"{stream} {state}" for stream, state in states), "|")  # noqa: T201
    print("|---" * (len(states) + 1) + "|")  # noqa: T201
    with serving_text() as fake:
        for command in (*COMMANDS, SERVE):
            cells = []
            for stream, state in states:
                with tempfile.TemporaryDirectory() as folder:
                    ran = run(command, stream, state, fake.address, Path(folder))
                lines = [line for line in ran.err.splitlines() if "cannot" in line]
                cells.append(f"{ran.exit_code} {' '.join(lines)}".strip())
            print(f"| `{command}` |", " | ".join(cells), "|", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
