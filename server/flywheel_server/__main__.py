"""The command `flywheel-server`: settings → engine → server → run until a signal."""

import asyncio
import faulthandler
import json
import os
import signal
import sys
from contextlib import suppress

# grpcio 1.80 turned this experiment on, and on asyncio it makes every message dearer, by up to a half (grpcio 1.85.1). It is
# read when grpc is imported.
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_listener")
# gRPC's own log of ordinary events, such as connections that end, is not in the form of ours.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

from flywheel_server import logs
from flywheel_server.engines.base import EngineError
from flywheel_server.engines.chosen import chosen_engine
from flywheel_server.health import SERVICE
from flywheel_server.server import serve
from flywheel_server.settings import Settings, parse

if sys.platform == "win32":
    from asyncio import new_event_loop
else:
    from uvloop import new_event_loop


def main() -> None:
    """Serves until SIGINT or SIGTERM. Exits with 1 where it cannot start, and with 2 where the settings are wrong."""
    settings = parse()
    # On a descriptor of its own: the embedded engine reads what is written to the standard one.
    faulthandler.enable(os.dup(2))
    logs.configure(settings.log_level, settings.log_format)
    try:
        with suppress(asyncio.CancelledError), asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(_serve_until_signal(settings))
    except (EngineError, OSError) as error:
        sys.exit(f"flywheel-server: {error}")


async def _serve_until_signal(settings: Settings) -> None:
    if task := asyncio.current_task():
        for number in (signal.SIGINT, signal.SIGTERM):
            # The first one cancels whatever is under way, starting or serving, and a second one the drain too.
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    async with serve(chosen_engine(settings), settings) as port:
        host = settings.address.rpartition(":")[0]
        request = json.dumps({"text": "What is the difference between a llama and an alpaca?", "max_tokens": 64})
        print(f"ready: grpcurl -plaintext -d '{request}' {host}:{port} {SERVICE}/GenerateDeltas", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    main()
