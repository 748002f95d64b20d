"""Draws the pictures of `flywheel top`: servers with the scripted engine, under load from callers with keys.

`make picture` runs this.
"""

import asyncio
import random
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Final

from flywheel_client import AsyncClient, FlywheelError
from flywheel_client._top.app import Top
from flywheel_client._top.servers import Servers

from benchmarks.serving import flywheel_server
from docs.picture import without_fonts

ONE_SERVER: Final = Path(__file__).parent / "top.svg"
SEVERAL_SERVERS: Final = Path(__file__).parent / "top-servers.svg"

CALLERS: Final = {"website": 8, "batch-jobs": 12, "evaluation": 4}
"""The callers, and how many calls each has running."""

NO_SERVER: Final = "localhost:1"

SIZE: Final = (80, 24)
INTERVAL: Final = 1.0
SCRAPES: Final = 34
LARGEST_PAUSE: Final = 0.5
SCRIPT: Final = '{"token_delay": 0.02, "prompt_delay": 0.1}'


@contextmanager
def server(keys_file: Path) -> Iterator[tuple[str, str]]:
    """Runs a server for the length of the context. Gives its address and the address of its metrics."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        metrics = f"localhost:{free.getsockname()[1]}"
    flags = ("--engine", "scripted", "--script", SCRIPT, "--max-concurrent", "16", "--max-queued", "8")
    with flywheel_server(*flags, "--metrics-address", metrics, "--api-keys-file", str(keys_file)) as address:
        yield address, metrics


def create_key(keys_file: Path, caller: str) -> str:
    """Returns a new key for a caller."""
    command = [sys.executable, "-m", "flywheel_server", "keys", "create", caller, "--file", str(keys_file)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


async def call(client: AsyncClient) -> None:
    """Makes calls until it is cancelled: most are streams, some are hasty, and a few are refused."""
    while True:
        kind = random.choices(("stream", "hasty", "tokenize", "wrong"), (80, 6, 12, 2))[0]
        with suppress(FlywheelError, TimeoutError):
            if kind == "tokenize":
                await client.tokenize("How many tokens?")
            elif kind == "wrong":
                await client.model(timeout=0.0001)
            else:
                async with asyncio.timeout(0.4 if kind == "hasty" else 60):
                    prompt = "Some words. " * random.randint(5, 60)
                    async for _ in client.generate_deltas(prompt, max_tokens=random.randint(10, 90)):
                        pass
        await asyncio.sleep(random.uniform(0, LARGEST_PAUSE))


@asynccontextmanager
async def load(addresses: Sequence[str], keys: Mapping[str, str]) -> AsyncIterator[None]:
    """Calls servers for the length of the context."""
    async with AsyncExitStack() as stack:
        calls = []
        for address in addresses:
            for caller, number in CALLERS.items():
                client = await stack.enter_async_context(AsyncClient(address, api_key=keys[caller]))
                calls += [asyncio.create_task(call(client)) for _ in range(number)]
        yield
        for each in calls:
            each.cancel()
        await asyncio.gather(*calls, return_exceptions=True)


async def draw(metrics: Sequence[str], *keys: str) -> str:
    """Returns the picture of the dashboard after some scrapes and these keys."""
    top = Top(Servers(metrics), INTERVAL)
    async with top.run_test(size=SIZE) as pilot:
        await pilot.press(*keys)
        await asyncio.sleep(SCRAPES * INTERVAL)
        return without_fonts(top.export_screenshot())


async def pictures(keys_file: Path) -> tuple[str, str]:
    """Returns the picture of one server and the picture of several, of which one does not answer."""
    keys = {caller: create_key(keys_file, caller) for caller in CALLERS}
    with ExitStack() as stack:
        (first, first_metrics), (second, second_metrics) = (stack.enter_context(server(keys_file)) for _ in range(2))
        async with load([first, first, second], keys):
            return (
                await draw([first_metrics]),
                await draw([first_metrics, second_metrics, NO_SERVER], "down", "right", "right"),
            )


def main() -> None:
    """Writes both pictures."""
    with tempfile.TemporaryDirectory() as directory:
        one_server, several_servers = asyncio.run(pictures(Path(directory) / "keys.json"))
    ONE_SERVER.write_text(one_server)
    SEVERAL_SERVERS.write_text(several_servers)


if __name__ == "__main__":
    main()
