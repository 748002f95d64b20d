"""The command `flywheel-server` as it serves: engine → server → run until a signal."""

import asyncio
import json
import os
import sys
from contextlib import suppress

# grpcio 1.80 turned this experiment on, and on asyncio it makes every message dearer, by up to a half (grpcio 1.85.1). It is
# read when grpc is imported.
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_listener")
# gRPC's own log of ordinary events, such as connections that end, is not in the form of ours.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

from flywheel_server import descriptors, heap, logs
from flywheel_server.engines.base import EngineError
from flywheel_server.engines.chosen import chosen_engine
from flywheel_server.health import SERVICE
from flywheel_server.output import Output
from flywheel_server.server import serve
from flywheel_server.settings import Settings
from flywheel_server.signals import StopSignals
from flywheel_server.supervision import EngineDiedError

if sys.platform == "win32":
    from asyncio import new_event_loop
else:
    from uvloop import new_event_loop


def run(settings: Settings, stop: StopSignals, stdout: Output, stderr: Output) -> int:
    """Serves until a signal stops it. Returns the exit code: 1 if it cannot start, or the engine has died."""
    heap.limit_heaps()
    descriptors.raise_limit()
    logs.configure(settings.log_level, settings.log_format, stderr)
    try:
        with suppress(asyncio.CancelledError), asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(_serve_until_signal(settings, stop, stdout, stderr))
    except (EngineError, OSError, ValueError) as error:
        stderr.write(f"flywheel-server: {error}\n".encode())
        return 1
    return 0


async def _serve_until_signal(settings: Settings, stop: StopSignals, stdout: Output, stderr: Output) -> None:
    loop, task = asyncio.get_running_loop(), asyncio.current_task()

    def cancel() -> None:
        # The first one cancels whatever is under way, starting or serving, and a second one the drain too.
        if task:
            loop.call_soon_threadsafe(task.cancel)

    try:
        with stop.calling(cancel):
            async with serve(chosen_engine(settings), settings) as port:
                stdout.write(f"ready: {_example(settings, port)}\n".encode())
                await asyncio.Event().wait()
    except EngineDiedError as error:
        stderr.write(f"flywheel-server: {error}\n".encode())
        stderr.close()
        # Not `sys.exit`: that waits for all threads, and those of a dead engine may never end.
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
