"""Measures the speed of the embedded engine beside busy processes, with several settings of its threads.

    python -m benchmarks.busy [--seconds 2] [--rounds 2]

For each token, the threads of the engine wait for one another some hundred times. A setting is THREADS:SPINS: the number of
threads, and how often a thread spins before it sleeps (GOMP_SPINCOUNT). THREADS alone means libgomp's own default of SPINS.
"default" is the server without these settings. Each setting has a server of its own, because libgomp reads the variable when it
is loaded. The settings are measured in turn, with the same clients and the same number of busy processes, while the other
servers are idle. Figures are medians over the rounds.
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
from flywheel_server.engines.llama_cpp.openmp import SPIN_VARIABLES
from flywheel_server.system.cores import usable_cores

from benchmarks.serving import flywheel_server

DEFAULT: Final = "default"
CLIENTS: Final = (1, 4)
SPINS: Final = (300, 1000, 10_000)
MAX_TOKENS: Final = 512
PROMPT: Final = "<|im_start|>Series {}: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,"
"""A prompt that the model continues for MAX_TOKENS."""
MAX_BUSY_SECONDS: Final = 60
"""Seconds after which a busy process ends, even if this program has been killed."""
LIBGOMP_SPINS: Final = 300_000
"""The default of GOMP_SPINCOUNT in libgomp."""


def main() -> None:
    """Measures, and prints a table."""
    cores = usable_cores()
    fixed = ["1", *(f"{cores}{spins}" for spins in ("", *(f":{spins}" for spins in SPINS)))]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.busy")
    parser.add_argument("--seconds", type=float, default=2.0, help="seconds of each measurement; default: 2")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--settings", nargs="+", default=fixed, metavar="THREADS[:SPINS]", help="settings to compare with the default"
    )
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
    """Runs a server with a setting for the length of the context, and gives its address."""
    variables = {name: value for name, value in os.environ.items() if name not in SPIN_VARIABLES}
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
    """Runs `count` busy processes for the length of the context."""
    code = f"import time\nend = time.monotonic() + {MAX_BUSY_SECONDS}\nwhile time.monotonic() < end: pass"
    with ExitStack() as stack:
        for _ in range(count):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", code]))
            stack.callback(process.kill)
        yield


async def speed(address: str, busy: int, clients: int, seconds: float) -> float:
    """Returns the tokens/s of all clients together beside `busy` busy processes."""
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
        # The first call is slower, because it loads code and data.
        await client.generate_all(PROMPT, max_tokens=1)
        with busy_processes(busy):
            start = time.perf_counter()
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await asyncio.gather(*(read(client, index) for index in range(clients)))
            found = sum(tokens) / (time.perf_counter() - start)
        # Before this is answered, llama.cpp may still be in a step of the cancelled calls.
        await client.generate_all(PROMPT, max_tokens=1)
        return found


if __name__ == "__main__":
    main()
