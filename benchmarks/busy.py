"""What busy cores leave of the embedded engine's speed: tokens/s beside busy processes, with several ways to wait.

    python -m benchmarks.busy [--seconds 2] [--rounds 2]

Threads that compute wait for one another some hundred times for each token. A setting is THREADS:SPINS: how many threads, and
how often one looks before it sleeps (GOMP_SPINCOUNT). THREADS alone leaves that to libgomp; "default" is the server as it
starts by itself. Each setting is a server of its own, because libgomp reads the variable when it is loaded. All settings take
turns with the same clients and the same number of busy processes; the others sleep. Figures are medians over the rounds.
"""

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Final

from flywheel_client import AsyncClient
from flywheel_server.engines.llama_cpp.openmp import USER_VARIABLES
from flywheel_server.system.cores import usable_cores

from benchmarks.serving import flywheel_server

DEFAULT: Final = "default"
CLIENTS: Final = (1, 4)
SPINS: Final = (300, 1000, 10_000)
MAX_TOKENS: Final = 512
# The model does not end this before MAX_TOKENS.
PROMPT: Final = "<|im_start|>Series {}: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,"
MAX_BUSY_SECONDS: Final = 60
"""After these a busy process ends by itself, whatever becomes of this program."""
LIBGOMP_SPINS: Final = 300_000
"""What libgomp does without the variable."""


def main() -> None:
    """Measures, and prints a table."""
    cores = usable_cores()
    fixed = ["1", *(f"{cores}{spins}" for spins in ("", *(f":{spins}" for spins in SPINS)))]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.busy")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--settings", nargs="+", default=fixed, metavar="THREADS[:SPINS]", help="beside the default")
    parser.add_argument("--busy", nargs="+", type=int, default=[0, (cores + 1) // 2, cores, 2 * cores], metavar="PROCESSES")
    options = parser.parse_args()
    settings = [DEFAULT, *options.settings]
    print("| busy | clients |", *(f"{setting} |" for setting in settings), "best fixed | default ÷ best |")
    print("|---|---|" + "---|" * (len(settings) + 2))
    with ExitStack() as stack:
        addresses = {setting: stack.enter_context(server(setting)) for setting in settings}
        for busy in options.busy:
            for clients in CLIENTS:
                found = defaultdict(list)
                for _ in range(options.rounds):
                    for setting, address in addresses.items():
                        found[setting].append(asyncio.run(speed(address, busy, clients, options.seconds)))
                print(row(busy, clients, {setting: statistics.median(speeds) for setting, speeds in found.items()}), flush=True)


def row(busy: int, clients: int, speeds: dict[str, float]) -> str:
    """Returns a row of the table."""
    best = max((setting for setting in speeds if setting != DEFAULT), key=speeds.__getitem__)
    figures = "".join(f" {speed:.1f} |" for speed in speeds.values())
    return f"| {busy} | {clients} |{figures} {best} | {speeds[DEFAULT] / speeds[best]:.2f} |"


@contextmanager
def server(setting: str) -> Iterator[str]:
    """Runs a server with that setting, and gives its address."""
    variables = {name: value for name, value in os.environ.items() if name not in USER_VARIABLES}
    if setting == DEFAULT:
        arguments = []
    else:
        threads, _, spins = setting.partition(":")
        arguments = ["--embedded-threads", threads]
        variables["GOMP_SPINCOUNT"] = spins or str(LIBGOMP_SPINS)
    with flywheel_server(*arguments, environment=variables) as address:
        yield address


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Keeps so many processes busy."""
    code = f"import time\nend = time.monotonic() + {MAX_BUSY_SECONDS}\nwhile time.monotonic() < end: pass"
    with ExitStack() as stack:
        for _ in range(count):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", code]))
            stack.callback(process.kill)
        yield


async def speed(address: str, busy: int, clients: int, seconds: float) -> float:
    """Returns the tokens/s of so many clients together beside so many busy processes."""
    tokens = [0] * clients

    async def read(client: AsyncClient, index: int) -> None:
        prompt = PROMPT.format(index)
        before = 0
        while True:
            async with client.generate_deltas(prompt, max_tokens=MAX_TOKENS, temperature=0.8) as deltas:
                async for delta in deltas:
                    tokens[index] = before + delta.generated_tokens
            before = tokens[index]

    async with AsyncClient(address) as client:
        # Loads what the first call loads.
        await client.generate_all(PROMPT, max_tokens=1)
        with busy_processes(busy):
            start = time.perf_counter()
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await asyncio.gather(*(read(client, index) for index in range(clients)))
            found = sum(tokens) / (time.perf_counter() - start)
        # Until it is answered, llama.cpp may still be in a step of the cancelled calls.
        await client.generate_all(PROMPT, max_tokens=1)
        return found


if __name__ == "__main__":
    main()
