"""Makes calls from a process of its own: `python -m chaos.callers LOAD`, with a `Load` as JSON.

It finds the gateways as every client does. It prints the `Outcome` of each call as a line of JSON when the call has ended. No
new calls begin after stdin is closed, or after the load's time or number of calls is used up. Then it waits for running calls.
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

FIRST_ANSWER: Final = "{}"
"""The line that is printed when the first answer arrives."""

FAILURE_PAUSE_SECONDS: Final = 0.2
"""Seconds until a stream's next call after a call that did not end as planned."""


class Callers:
    """Makes the calls of all streams."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._credentials = grpc.ssl_channel_credentials(Path(load.authority).read_bytes())
        self._end_at = time.monotonic() + load.seconds
        self._calls_left = load.calls
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._answered = False

    def run(self) -> None:
        """Makes the calls, and returns when all have ended."""
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

    def _may_begin(self) -> bool:
        """Returns whether another call may begin, and counts it."""
        if self._closed.is_set() or time.monotonic() >= self._end_at:
            return False
        with self._lock:
            self._calls_left -= 1
            return self._calls_left >= 0

    def _stream(self, client: Client, number: int) -> None:
        for plan in plans(self._load, number):
            if plan.kind == "generate_all" and plan.end == "cancel":
                continue  # the blocking generate_all cannot be cancelled
            if not self._may_begin():
                return
            if not self._call(client, plan):
                time.sleep(FAILURE_PAUSE_SECONDS)

    def _call(self, client: Client, plan: Plan) -> bool:
        """Makes the call, and returns whether it ended as planned."""
        received, begun = Received(plan), time.monotonic()
        try:
            if plan.kind == "generate_all":
                self._check_samples(received, client.generate_all(**plan.fields))
            else:
                with getattr(client, plan.kind)(**plan.fields) as stream:
                    if plan.end == "cancel":
                        threading.Timer(plan.after, stream.cancel).start()
                    for answer in stream:
                        self._check(received, answer)
            received.end()
        except FlywheelError as error:
            return self._report(plan, "threads", received, begun, error)
        return self._report(plan, "threads", received, begun, None)

    async def _async_stream(self, client: AsyncClient, number: int) -> None:
        for plan in plans(self._load, number):
            if not self._may_begin():
                return
            if not await self._async_call(client, plan):
                await asyncio.sleep(FAILURE_PAUSE_SECONDS)

    async def _async_call(self, client: AsyncClient, plan: Plan) -> bool:
        """Makes the call, and returns whether it ended as planned."""
        received, begun = Received(plan), time.monotonic()
        call = asyncio.create_task(self._async_read(client, plan, received))
        if plan.end == "cancel":
            asyncio.get_running_loop().call_later(plan.after, call.cancel)
        (error,) = await asyncio.gather(call, return_exceptions=True)
        if error is not None and not isinstance(error, (FlywheelError, asyncio.CancelledError)):
            raise error
        return self._report(plan, "asyncio", received, begun, error)

    async def _async_read(self, client: AsyncClient, plan: Plan, received: Received) -> None:
        if plan.kind == "generate_all":
            self._check_samples(received, await client.generate_all(**plan.fields))
        else:
            async with getattr(client, plan.kind)(**plan.fields) as stream:
                async for answer in stream:
                    self._check(received, answer)
        received.end()

    def _check_samples(self, received: Received, response: Any) -> None:  # noqa: ANN401 - from either client
        for sample in response.responses:
            self._check(received, sample)

    def _check(self, received: Received, answer: Any) -> None:  # noqa: ANN401 - a sample or a delta
        received.delta(answer.index, answer.text, answer.generated_tokens, answer.finish_reason)
        if not self._answered:
            self._answered = True
            self._print(FIRST_ANSWER)

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
        with self._lock:
            print(line, flush=True)


def main() -> None:
    """Makes the calls of the load in the first argument."""
    Callers(Load(**json.loads(sys.argv[1]))).run()


if __name__ == "__main__":
    main()
