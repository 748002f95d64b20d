"""The server of the soak: `flywheel-server` with its arguments, which tells what it holds. Linux only.

It prints its address, and then its figures for each line that it reads, until its standard input ends.
"""

import asyncio
import json
import sys

import flywheel_server.serve_command  # noqa: F401 - sets what grpc reads from the environment when it is imported
import psutil
import uvloop
from flywheel_server import logs
from flywheel_server.engine_factory import create_engine
from flywheel_server.server import serve
from flywheel_server.settings import parse


def main() -> None:
    """Serves until the end of the standard input."""
    uvloop.run(_serve())


async def _serve() -> None:
    settings = parse()
    logs.configure(settings.log_level, settings.log_format)
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    async with serve(create_engine(settings), settings) as port:
        print(f"127.0.0.1:{port}", flush=True)
        async for _ in lines:
            print(json.dumps(_figures()), flush=True)


def _figures() -> dict[str, int]:
    """Returns what this process holds: bytes of resident memory, file descriptors, threads, and asyncio's tasks."""
    this = psutil.Process()
    return {
        "resident": this.memory_info().rss,
        "descriptors": this.num_fds(),
        "threads": this.num_threads(),
        "tasks": len(asyncio.all_tasks()),
    }


if __name__ == "__main__":
    main()
