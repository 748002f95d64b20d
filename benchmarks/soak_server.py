"""The server of the soak: takes the arguments of `flywheel-server`, and reports its resources. Linux only.

It prints its address. Then it prints its resources as JSON for each line that it reads, until the end of its standard input.
"""

import asyncio
import json
import sys

import flywheel_server.serve_command  # noqa: F401 - sets environment variables that grpc reads when it is imported
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
    """Returns the resources of this process: bytes of resident memory, file descriptors, threads, and asyncio tasks."""
    this = psutil.Process()
    return {
        "resident": this.memory_info().rss,
        "descriptors": this.num_fds(),
        "threads": this.num_threads(),
        "tasks": len(asyncio.all_tasks()),
    }


if __name__ == "__main__":
    main()
