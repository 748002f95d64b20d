"""The command `flywheel-server` as it serves: settings → engine → server → run until a signal."""

import asyncio
import json
import os
import socket
import sys
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager, AbstractContextManager, suppress
from typing import Any, NoReturn

# grpcio 1.80 turned this experiment on, and on asyncio it makes every message dearer, by up to a half (grpcio 1.85.1). It is
# read when grpc is imported.
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_listener")
# gRPC's own log of ordinary events, such as connections that end, is not in the form of ours.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

from flywheel_proto._service_name import SERVICE_NAME

from flywheel_server import logs
from flywheel_server.engine_factory import create_engine
from flywheel_server.engines.base import Engine, EngineError
from flywheel_server.server import serve
from flywheel_server.settings import Settings
from flywheel_server.supervision import EngineDiedError
from flywheel_server.system import descriptors, heap
from flywheel_server.system.output import Output
from flywheel_server.system.signals import StopSignals
from flywheel_server.workers.link import Link
from flywheel_server.workers.parent import WorkersError, serve_in_workers

if sys.platform == "win32":
    from asyncio import new_event_loop
else:
    from uvloop import new_event_loop


def run(settings: Settings, stop: StopSignals, stdout: Output, stderr: Output, engine: Engine | None = None) -> int:
    """Serves the engine, by default the one that the settings name, until a signal stops it.

    Returns the exit code: 1 if it cannot start, or the engine has died.
    """
    _prepare(settings, stderr)
    return _run(_serve_until_signal(settings, stop, stdout, stderr, engine), stderr)


def work(settings: Settings, pair: socket.socket, number: int, stderr: Output) -> int:
    """Serves as one of several workers until the parent says otherwise. Returns the exit code, as `run` does.

    Arguments:
        settings: Those of the parent, with the address that all workers listen on.
        pair: Leads to the parent.
        number: Which worker this is.
        stderr: Where the log goes.
    """
    _prepare(settings, stderr, number)
    return _run(_serve_until_told(settings, pair, stderr), stderr)


def _prepare(settings: Settings, stderr: Output, worker: int | None = None) -> None:
    heap.limit_heaps()
    descriptors.raise_limit()
    logs.configure(settings.log_level, settings.log_format, stderr, worker=worker)


def _run(serving: Coroutine[Any, Any, None], stderr: Output) -> int:
    """Serves until that is cancelled, and returns the exit code."""
    try:
        with suppress(asyncio.CancelledError), asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(serving)
    except (EngineError, OSError, ValueError, WorkersError) as error:
        stderr.write(f"flywheel-server: {error}\n".encode())
        return 1
    return 0


async def _serve_until_signal(
    settings: Settings, stop: StopSignals, stdout: Output, stderr: Output, engine: Engine | None
) -> None:
    def ready(port: int) -> None:
        stdout.write(f"ready: {_example(settings, port)}\n".encode())

    if settings.workers > 1:
        if engine is not None:
            raise ValueError("workers must be 1 with an engine of your own: each worker makes its engine from the settings")
        await _serve(serve_in_workers(settings, sys.argv[1:], stderr.write), stop.calling, ready)
        return
    try:
        await _serve(serve(create_engine(settings) if engine is None else engine, settings), stop.calling, ready)
    except EngineDiedError as error:
        stderr.write(f"flywheel-server: {error}\n".encode())
        _exit_without_threads(stderr)


async def _serve_until_told(settings: Settings, pair: socket.socket, stderr: Output) -> None:
    link = await Link.over(pair)
    try:
        await _serve(serve(create_engine(settings), settings, link), link.calling, lambda _: link.ready())
    except (EngineError, OSError, ValueError, EngineDiedError) as error:
        await link.fail(str(error))
        _exit_without_threads(stderr)


async def _serve(
    serving: AbstractAsyncContextManager[int],
    calling: Callable[[Callable[[], None]], AbstractContextManager[None]],
    on_ready: Callable[[int], None],
) -> None:
    """Serves until it is told to stop; `calling` has a function called for that, on any thread."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()

    def cancel() -> None:
        # The first one cancels whatever is under way, starting or serving, and a second one the drain too.
        if task:
            loop.call_soon_threadsafe(task.cancel)

    with calling(cancel):
        async with serving as port:
            on_ready(port)
            await asyncio.Event().wait()


def _exit_without_threads(stderr: Output) -> NoReturn:
    """Exits with 1. Not by `sys.exit`: that waits for all threads, and those of a dead engine may never end."""
    stderr.close()
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
    return f"grpcurl {' '.join(options)} -d '{request}' {host}:{port} {SERVICE_NAME}/GenerateDeltas"
