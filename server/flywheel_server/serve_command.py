"""Runs the server for the command `flywheel-server`: settings → engine → server, until a signal stops it."""

import asyncio
import json
import os
import socket
import sys
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager, AbstractContextManager, nullcontext, suppress
from typing import Any, NoReturn

# grpcio 1.80 turned this experiment on. With asyncio, it makes every message up to 50 % more expensive (grpcio 1.85.1). The
# variable is read when grpc is imported.
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_listener")
# gRPC logs ordinary events too, such as closed connections, in a format of its own.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

from flywheel_proto._extras import reason
from flywheel_proto._service_name import SERVICE_NAME

from flywheel_server import logs
from flywheel_server.engine_factory import create_engine
from flywheel_server.engines.base import Engine, EngineError
from flywheel_server.server import serve
from flywheel_server.settings import Settings
from flywheel_server.supervision import EngineDiedError
from flywheel_server.system import descriptors, garbage, heap
from flywheel_server.system.output import Output
from flywheel_server.system.signals import SignalReceiver
from flywheel_server.workers.link import Link
from flywheel_server.workers.parent import WorkersError, serve_in_workers

if sys.platform == "win32":
    from asyncio import new_event_loop
else:
    from uvloop import new_event_loop


def run(settings: Settings, receiver: SignalReceiver, stdout: Output, stderr: Output, engine: Engine | None = None) -> int:
    """Serves the engine, by default the one that the settings name, until a signal stops the server.

    Returns the exit code: 0 after a stop, 1 after a failure.
    """
    serving = _serve_until_signal(settings, receiver, stdout, stderr, engine)
    return _run(settings, stderr, serving, receiver.switching_debug(logs.set_debug))


def run_worker(settings: Settings, pair: socket.socket, number: int, stderr: Output) -> int:
    """Serves as one of several workers until the parent process stops it. Returns the exit code, as `run` does.

    Arguments:
        settings: The settings of the parent, with the address that all workers listen on.
        pair: The socket to the parent.
        number: The number of this worker.
        stderr: The output for the log.
    """
    # The parent switches debug.
    return _run(settings, stderr, _serve_until_parent_stops(settings, pair, stderr), nullcontext(), worker=number)


def _run(
    settings: Settings,
    stderr: Output,
    serving: Coroutine[Any, Any, None],
    switching_debug: AbstractContextManager[None],
    worker: int | None = None,
) -> int:
    """Prepares the process, runs the coroutine until it is cancelled or fails, and returns the exit code.

    The context is entered once the log has been configured.
    """
    heap.limit_heaps()
    descriptors.raise_limit()
    logs.configure(settings.log_level, settings.log_format, stderr, worker=worker)
    try:
        with switching_debug, suppress(asyncio.CancelledError), asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(serving)
    except (EngineError, OSError, ValueError, WorkersError) as error:
        stderr.write(f"flywheel-server: {error}\n".encode())
        return 1
    except ImportError as error:
        # A package that only some settings need.
        stderr.write(f"flywheel-server: {reason(error)}\n".encode())
        return 1
    return 0


async def _serve_until_signal(
    settings: Settings, receiver: SignalReceiver, stdout: Output, stderr: Output, engine: Engine | None
) -> None:
    def ready(port: int) -> None:
        stdout.write(f"ready: {_example(settings, port)}\n".encode())

    if settings.workers > 1:
        if engine is not None:
            raise ValueError("workers must be 1 with an engine of your own: each worker makes its engine from the settings")
        # The standard error of a worker is a pipe to this process, so a worker cannot tell what it is here.
        arguments = [*sys.argv[1:], f"--log-format={logs.resolved(settings.log_format, stderr)}"]
        workers = serve_in_workers(settings, arguments, stderr.write, receiver.switching_debug)
        await _serve(workers, receiver.calling, ready)
        return
    try:
        await _serve(serve(create_engine(settings) if engine is None else engine, settings), receiver.calling, ready)
    except EngineDiedError as error:
        stderr.write(f"flywheel-server: {error}\n".encode())
        _exit_without_threads(stderr)


async def _serve_until_parent_stops(settings: Settings, pair: socket.socket, stderr: Output) -> None:
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
    """Serves until a stop is requested: within the context of `calling`, each request calls a function, on any thread."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()

    def cancel() -> None:
        # The first request cancels starting or serving, and a second one cancels the drain.
        if task:
            loop.call_soon_threadsafe(task.cancel)

    with calling(cancel):
        async with serving as port:
            garbage.exempt()
            on_ready(port)
            await asyncio.Event().wait()


def _exit_without_threads(stderr: Output) -> NoReturn:
    """Exits with 1. Does not use `sys.exit`, which waits for all threads: a thread of a dead engine may never end."""
    stderr.close()
    os._exit(1)


def _example(settings: Settings, port: int) -> str:
    """Returns a shell command that calls the server. The user fills in the words in capitals."""
    host = settings.address.rpartition(":")[0]
    request = json.dumps({"text": "What is the difference between a llama and an alpaca?", "max_tokens": 64})
    options = ["-cacert CA.pem" if settings.tls_cert else "-plaintext"]
    if settings.tls_client_ca:
        options.append("-cert CLIENT.pem -key CLIENT-KEY.pem")
    if settings.api_keys or settings.api_keys_file:
        options.append("-H 'authorization: Bearer KEY'")
    return f"grpcurl {' '.join(options)} -d '{request}' {host}:{port} {SERVICE_NAME}/GenerateDeltas"
