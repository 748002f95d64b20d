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

from flywheel_server import descriptors, keys_command, logs
from flywheel_server.engines.base import EngineError
from flywheel_server.engines.chosen import chosen_engine
from flywheel_server.health import SERVICE
from flywheel_server.server import serve
from flywheel_server.settings import Settings, parse
from flywheel_server.supervision import EngineDiedError

if sys.platform == "win32":
    from asyncio import new_event_loop
else:
    from uvloop import new_event_loop


def main() -> None:
    """Serves until SIGINT or SIGTERM, or manages its keys.

    Exits with 1 where it cannot start or the engine has died, and with 2 where the settings are wrong.
    """
    if sys.argv[1:2] == ["keys"]:
        keys_command.main(sys.argv[2:])
        return
    settings = parse()
    descriptors.raise_limit()
    # On a descriptor of its own: the embedded engine reads what is written to the standard one.
    faulthandler.enable(os.dup(2))
    logs.configure(settings.log_level, settings.log_format)
    try:
        with suppress(asyncio.CancelledError), asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(_serve_until_signal(settings))
    except (EngineError, OSError, ValueError) as error:
        sys.exit(f"flywheel-server: {error}")


async def _serve_until_signal(settings: Settings) -> None:
    if task := asyncio.current_task():
        for number in (signal.SIGINT, signal.SIGTERM):
            # The first one cancels whatever is under way, starting or serving, and a second one the drain too.
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    try:
        async with serve(chosen_engine(settings), settings) as port:
            print(f"ready: {_example(settings, port)}", flush=True)
            await asyncio.Event().wait()
    except EngineDiedError as error:
        # Not `sys.exit`: that waits for all threads, and those of a dead engine may never end.
        print(f"flywheel-server: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def _example(settings: Settings, port: int) -> str:
    """Returns a call of the server that works in a terminal, with what the caller has to fill in in capitals."""
    host = settings.address.rpartition(":")[0]
    request = json.dumps({"text": "What is the difference between a llama and an alpaca?", "max_tokens": 64})
    options = ["-cacert CA.pem" if settings.tls_cert else "-plaintext"]
    if settings.tls_client_ca:
        options.append("-cert CLIENT.pem -key CLIENT-KEY.pem")
    if settings.api_keys or settings.api_keys_file:
        options.append("-H 'authorization: Bearer KEY'")
    return f"grpcurl {' '.join(options)} -d '{request}' {host}:{port} {SERVICE}/GenerateDeltas"


if __name__ == "__main__":
    main()
