"""Measures how long the programs take to start: `python -m benchmarks.startup`.

In each round, each program runs once, and so does `import grpc` alone. The ratios compare CPU time, which depends little on
other load of the machine. Then measures the seconds from the start of `flywheel-server` until its health is SERVING, with each
local engine.
"""

import argparse
import asyncio
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from flywheel_client import AsyncClient, UnavailableError

GRPC: Final = "import grpc"
PORT: Final = 50977


def programs(keys: Path) -> dict[str, list[str]]:
    """Returns the commands by name, `GRPC` first. `keys` is the path of a keys file."""
    flywheel, server = (str(Path(sys.executable).with_name(name)) for name in ("flywheel", "flywheel-server"))
    code = [GRPC, "import flywheel_client", "from flywheel_client import Client"]
    client = ["--version", "--help", "generate --help", "health --address localhost:1"]
    serving = ["--version", "--help", "keys --help", f"keys list --file {keys}"]
    return {
        **{line: [sys.executable, "-c", line] for line in code},
        **{f"flywheel {line}": [flywheel, *line.split()] for line in client},
        "python -m flywheel_client --help": [sys.executable, "-m", "flywheel_client", "--help"],
        **{f"flywheel-server {line}".replace(str(keys), "FILE"): [server, *line.split()] for line in serving},
    }


def duration(command: list[str]) -> tuple[float, float]:
    """Returns the milliseconds of time and of CPU time that a command takes, whatever its exit code."""
    begun, used = time.perf_counter(), cpu_time_of_children()
    subprocess.run(command, capture_output=True, check=False)
    return (time.perf_counter() - begun) * 1000, (cpu_time_of_children() - used) * 1000


def cpu_time_of_children() -> float:
    """Returns the seconds of CPU time of all child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


async def until_serving(engine: str) -> float:
    """Returns the seconds until a server with this engine is SERVING."""
    address = f"127.0.0.1:{PORT}"
    command = [sys.executable, "-m", "flywheel_server", "--engine", engine, "--address", address, "--log-level", "warning"]
    begun = time.perf_counter()
    server = await asyncio.create_subprocess_exec(*command, stdout=subprocess.DEVNULL)
    try:
        async with AsyncClient(address, retry=None, channel_options=[("grpc.initial_reconnect_backoff_ms", 10)]) as client:
            while True:
                if server.returncode is not None:
                    raise RuntimeError(f"the server has ended with {server.returncode}")
                try:
                    if await client.health(wait_for_ready=True, timeout=30) == "SERVING":
                        return time.perf_counter() - begun
                except UnavailableError:
                    pass  # it listens, but does not accept connections yet
                await asyncio.sleep(0.01)
    finally:
        server.terminate()
        await server.wait()


def main() -> None:
    """Measures and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        keys = Path(directory) / "keys.json"
        keys.write_text('{"keys": []}')
        commands = programs(keys)
        for command in commands.values():
            duration(command)  # compiles the bytecode
        rounds = [{name: duration(command) for name, command in commands.items()} for _ in range(given.rounds)]
    print(f"| program | ms | CPU ms | CPU ÷ `{GRPC}`, median | least, most |\n|---|---|---|---|---|")
    for name in commands:
        took, used = (statistics.median(column) for column in zip(*(one[name] for one in rounds), strict=True))
        ratios = [one[name][1] / one[GRPC][1] for one in rounds]
        middle, least, most = statistics.median(ratios), min(ratios), max(ratios)
        print(f"| `{name}` | {took:.0f} | {used:.0f} | {middle:.2f} | {least:.2f}, {most:.2f} |")
    print("\n| engine | seconds until SERVING, median | rounds |\n|---|---|---|")
    os.environ["GRPC_VERBOSITY"] = "NONE"
    for engine in ("scripted", "embedded"):
        seconds = [asyncio.run(until_serving(engine)) for _ in range(given.rounds)]
        print(f"| {engine} | {statistics.median(seconds):.2f} | {', '.join(f'{each:.2f}' for each in sorted(seconds))} |")


if __name__ == "__main__":
    main()
