"""A process of callers: `python -m chaos.callers LOAD`, with a `Load` as JSON.

It finds the gateways as every client does, and prints an `Outcome` as a line of JSON for each call that has ended. No further
calls begin when stdin is closed, or the time or the number of calls of the load is used up; it ends when all have ended.
"""

import asyncio
import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import grpc
from flywheel_client import AsyncClient, Client, FlywheelError

from chaos.load import Load, Outcome, Plan, Received, plans

FIRST: Final = "{}"
"""What is printed when the first calls have begun to answer."""

PAUSE: Final = 0.2
"""Seconds until a stream goes on after a call that did not end as planned."""


class Callers:
    """All streams of the process."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._credentials = grpc.ssl_channel_credentials(Path(load.authority).read_bytes())
        self._until = time.monotonic() + load.seconds
        self._left = load.calls
        self._closed = threading.Event()
        self._printing = threading.Lock()
        self._answered = False

    def run(self) -> None:
        """Returns when all calls have ended."""
        threading.Thread(target=self._watch_stdin, daemon=True).start()
        asyncio.run(self._run())

    def _watch_stdin(self) -> None:
        sys.stdin.read()
        self._closed.set()

    async def _run(self) -> None:
        load = self._load
        options: dict[str, Any] = {"api_key": load.key, "credentials": self._credentials}
        threads = ThreadPoolExecutor(load.streams)
        loop = asyncio.get_running_loop()
        with Client.from_modal(load.app, **options) as client:
            async with AsyncClient.from_modal(load.app, **options) as async_client:
                streams = range(load.streams)
                await asyncio.gather(
                    *(loop.run_in_executor(threads, self._stream, client, number) for number in streams if number % 2),
                    *(self._async_stream(async_client, number) for number in streams if not number % 2),
                )

    def _next(self) -> bool:
        """Returns whether another call is to begin, which then counts."""
        if self._closed.is_set() or time.monotonic() >= self._until:
            return False
        with self._printing:
            self._left -= 1
            return self._left >= 0

    def _stream(self, client: Client, number: int) -> None:
        for plan in plans(self._load, number):
            if plan.kind == "generate_all" and plan.end == "cancel":
                continue  # a thread that waits for it cannot cancel it
            if not self._next():
                return
            if not self._one(client, plan):
                time.sleep(PAUSE)

    def _one(self, client: Client, plan: Plan) -> bool:
        """Makes the call, and returns whether it ended as planned."""
        received, begun = Received(plan), time.monotonic()
        try:
            if plan.kind == "generate_all":
                self._whole(received, client.generate_all(**plan.fields))
            else:
                with getattr(client, plan.kind)(**plan.fields) as stream:
                    if plan.end == "cancel":
                        threading.Timer(plan.after, stream.cancel).start()
                    for piece in stream:
                        self._piece(received, piece)
            received.end()
        except FlywheelError as error:
            return self._report(plan, "threads", received, begun, error)
        return self._report(plan, "threads", received, begun, None)

    async def _async_stream(self, client: AsyncClient, number: int) -> None:
        for plan in plans(self._load, number):
            if not self._next():
                return
            if not await self._async_one(client, plan):
                await asyncio.sleep(PAUSE)

    async def _async_one(self, client: AsyncClient, plan: Plan) -> bool:
        """Makes the call, and returns whether it ended as planned."""
        received, begun = Received(plan), time.monotonic()
        call = asyncio.create_task(self._async_call(client, plan, received))
        if plan.end == "cancel":
            asyncio.get_running_loop().call_later(plan.after, call.cancel)
        (error,) = await asyncio.gather(call, return_exceptions=True)
        if error is not None and not isinstance(error, (FlywheelError, asyncio.CancelledError)):
            raise error
        return self._report(plan, "asyncio", received, begun, error)

    async def _async_call(self, client: AsyncClient, plan: Plan, received: Received) -> None:
        if plan.kind == "generate_all":
            self._whole(received, await client.generate_all(**plan.fields))
        else:
            async with getattr(client, plan.kind)(**plan.fields) as stream:
                async for piece in stream:
                    self._piece(received, piece)
        received.end()

    def _whole(self, received: Received, response: Any) -> None:  # noqa: ANN401 - of either client
        for sample in response.responses:
            self._piece(received, sample)

    def _piece(self, received: Received, piece: Any) -> None:  # noqa: ANN401 - a sample or a delta
        received.delta(piece.index, piece.text, piece.generated_tokens, piece.finish_reason)
        if not self._answered:
            self._answered = True
            self._print(FIRST)

    def _report(self, plan: Plan, client: str, received: Received, begun: float, error: BaseException | None) -> bool:
        failed = error if isinstance(error, FlywheelError) else None
        status = failed.code.name if failed else "CANCELLED" if error else "OK"
        outcome = Outcome(
            client=client,
            kind=plan.kind,
            end=plan.end,
            status=status,
            reason=failed.reason if failed else "",
            message=failed.message if failed else "",
            begun=begun,
            ended=time.monotonic(),
            due=begun + (plan.after if plan.end == "cancel" else plan.timeout),
            wrong=received.wrong,
        )
        self._print(json.dumps(asdict(outcome)))
        return outcome.as_planned

    def _print(self, line: str) -> None:
        with self._printing:
            print(line, flush=True)


def main() -> None:
    """Calls, and prints what comes of it."""
    Callers(Load(**json.loads(sys.argv[1]))).run()


if __name__ == "__main__":
    main()
