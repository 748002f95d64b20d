"""Counts what a call and a delta cost the event loop: `python -m benchmarks.iterations`.

Counts the iterations of the event loop, the callbacks that it runs (including timers and sockets), and the tasks that it
starts. The servers are ours, with the scripted engine and an API key, and a bare grpc.aio server. Calls run one after the
other, so that no two calls share an iteration. uvloop offers no way to count; asyncio's own loop takes the same steps.
"""

import asyncio
import logging
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Final
from unittest.mock import patch

from benchmarks.peers import KEY, ONE_POLLER
from benchmarks.scenarios import TEXT

os.environ.update(ONE_POLLER)

import grpc
import structlog
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_proto.v1 import generation_pb2_grpc
from flywheel_server.engines.scripted import Script, ScriptedEngine
from flywheel_server.server import serve
from flywheel_server.settings import Settings
from pydantic import SecretStr

from benchmarks.peers import bare

TOKEN_DELAY: Final = 0.005
"""Seconds before each token: long enough for the loop to finish all other work."""

CALLS: Final = 200
TOKENS: Final = 500

EVENT_COUNTS: Final[Counter[str]] = Counter()
"""Counts of iterations, callbacks and tasks so far."""


class CountingLoop(asyncio.SelectorEventLoop):
    """An event loop that counts. It overrides private methods, because there is no public way to count."""

    def __init__(self) -> None:
        super().__init__()
        self.set_task_factory(_counted_task)
        run_callback = asyncio.Handle._run  # noqa: SLF001

        def counted_callback(handle: asyncio.Handle) -> None:
            EVENT_COUNTS["callbacks"] += 1
            run_callback(handle)

        self._counting = patch.object(asyncio.Handle, "_run", counted_callback)
        self._counting.start()

    def close(self) -> None:
        """Closes the loop."""
        self._counting.stop()
        super().close()

    def _run_once(self) -> None:
        EVENT_COUNTS["iterations"] += 1
        super()._run_once()  # type: ignore[misc]


def _counted_task(loop: asyncio.AbstractEventLoop, steps: Any, **options: Any) -> asyncio.Task[Any]:  # noqa: ANN401 - any task
    EVENT_COUNTS["tasks"] += 1
    return asyncio.Task(steps, loop=loop, **options)


@asynccontextmanager
async def ours() -> AsyncIterator[int]:
    """Runs our server for the length of the context, and gives its port."""
    settings = Settings(address="127.0.0.1:0", engine="scripted", api_keys=[SecretStr(KEY)], withdraw_window=0)
    async with serve(ScriptedEngine(Script(text=TEXT, token_delay=TOKEN_DELAY)), settings) as port:
        yield port


@asynccontextmanager
async def bare_server() -> AsyncIterator[int]:
    """Runs the bare server for the length of the context, and gives its port."""
    server, port = await bare.start(bare.BareService(TEXT, TOKEN_DELAY))  # type: ignore[abstract] # gRPC answers the other methods
    try:
        yield port
    finally:
        await server.stop(None)


async def counted(port: int) -> dict[str, dict[str, float]]:
    """Returns the average counts of each kind of load, for each call or for each delta."""

    async def average(load: Callable[[], None], times: int) -> dict[str, float]:
        before = EVENT_COUNTS.copy()
        # The client runs on threads of its own, so it does not use this loop.
        await asyncio.to_thread(load)
        return {kind: (EVENT_COUNTS[kind] - before[kind]) / times for kind in ("iterations", "callbacks", "tasks")}

    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        metadata = (("authorization", f"Bearer {KEY}"),)

        def unary(calls: int) -> None:
            for _ in range(calls):
                stub.GenerateAll(pb.GenerationRequest(text="Hello", max_tokens=1), metadata=metadata, timeout=60)

        def streams(calls: int, tokens: int) -> None:
            for _ in range(calls):
                request = pb.GenerationRequest(text="Hello", max_tokens=tokens)
                for _ in stub.GenerateDeltas(request, metadata=metadata, timeout=60):
                    pass

        await asyncio.to_thread(unary, 1)  # connects
        return {
            "GenerateAll, a call of 1 token": await average(lambda: unary(CALLS), CALLS),
            "GenerateDeltas, a call of 1 token": await average(lambda: streams(CALLS, 1), CALLS),
            f"GenerateDeltas, a delta of {TOKENS}": await average(lambda: streams(1, TOKENS), TOKENS),
        }


async def measured(server: Callable[[], Any]) -> dict[str, dict[str, float]]:
    """Runs a server, and returns its average counts."""
    async with server() as port:
        return await counted(port)


def run(main: Coroutine[Any, Any, dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Runs a coroutine on an event loop that counts."""
    with asyncio.Runner(loop_factory=CountingLoop) as runner:
        return runner.run(main)


def main() -> None:
    """Counts and prints the table."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    print("| | server | iterations | callbacks | tasks |\n|---|---|---|---|---|")
    by_server = {"ours": run(measured(ours)), "bare": run(measured(bare_server))}
    for load in by_server["ours"]:
        for server, loads in by_server.items():
            print(f"| {load} | {server} | {' | '.join(f'{count:.1f}' for count in loads[load].values())} |")


if __name__ == "__main__":
    main()
