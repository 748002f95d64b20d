"""Servers are stopped, killed and started again under load, and clients lose nothing without being told."""

from __future__ import annotations

import asyncio
import re
import signal
import sys
from asyncio.subprocess import PIPE
from collections import Counter
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc.aio
import pytest
from flywheel_client import SERVICE_CONFIG, AsyncClient, Client, Retry, UnavailableError
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_proto.v1 import generation_pb2_grpc
from flywheel_server.engines.scripted import ScriptedEngine
from flywheel_server.server import serve
from flywheel_server.settings import Settings

from tests.client.conftest import Caller
from tests.draining import HeldEngine
from tests.serving import free_ports, serving, through_a_cable, until
from tests.thorough import further

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from collections.abc import AsyncIterator, Callable

TOKENS = 20
SCRIPT = '{"text": "abcd", "token_delay": 0.01, "prompt_delay": 0.02}'
TEXT = "abcd" * TOKENS
PATIENT = Retry(max_attempts=12, initial_backoff=0.1, max_backoff=2.0)


async def started(address: str, script: str = SCRIPT) -> Process:
    """Starts a server, and returns its process when it is ready."""
    options = {
        "engine": "scripted",
        "script": script,
        "address": address,
        "withdraw-window": "0.3",
        "drain-timeout": "10",
        "log-level": "error",
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "flywheel_server", *(f"--{name}={value}" for name, value in options.items()), stdout=PIPE
    )
    assert process.stdout is not None
    async with asyncio.timeout(30):
        assert re.match(b"ready: ", await process.stdout.readline())
    return process


async def stopped(process: Process, number: signal.Signals) -> int:
    process.send_signal(number)
    async with asyncio.timeout(30):
        return await process.wait()


@asynccontextmanager
async def servers(*addresses: str, script: str = SCRIPT) -> AsyncIterator[dict[str, Process]]:
    """Runs a server at each address; the test may put others in their place."""
    running: dict[str, Process] = {}
    try:
        for address in addresses:
            running[address] = await started(address, script)
        yield running
    finally:
        for process in running.values():
            if process.returncode is None:
                process.kill()
            await process.communicate()


@pytest.mark.parametrize("kind", [Client, *further([AsyncClient])], ids=["threads", "asyncio"])
async def test_no_call_fails_while_one_server_after_the_other_restarts(kind: Any) -> None:
    addresses = [f"127.0.0.1:{port}" for port in free_ports(2)]
    outcomes: Counter[str] = Counter()
    over = asyncio.Event()

    async def work(one: Caller) -> None:
        while not over.is_set():
            stream = await one.stream(max_tokens=TOKENS)
            text = ""
            while (more := await one.next(stream)) is not None:
                text += more
            outcomes[text] += 1
            answer = await one.ask(one.client.generate_all, "p", max_tokens=TOKENS)
            outcomes[answer.responses[0].text] += 1

    async with servers(*addresses) as running:
        one = Caller(kind, "ipv4:" + ",".join(addresses), retry=PATIENT)
        workers = [asyncio.create_task(work(one)) for _ in range(6)]

        async def goes_on(calls: int) -> None:
            enough = outcomes.total() + calls
            await until(lambda: outcomes.total() >= enough or any(worker.done() for worker in workers), "calls go on")

        for address in addresses:
            await goes_on(12)
            assert await stopped(running[address], signal.SIGTERM) == 0
            await goes_on(12)
            running[address] = await started(address)
        await goes_on(12)
        over.set()
        await asyncio.gather(*workers)
        await one.close()
    assert set(outcomes) == {TEXT}


class Stubs:
    """Stubs with the service config, with the methods of a client that the tests use."""

    def __init__(self, target: str) -> None:
        self._channel = grpc.aio.insecure_channel(target, options=[("grpc.service_config", SERVICE_CONFIG)])
        self._stub: Any = generation_pb2_grpc.GenerationServiceStub(self._channel)

    async def call(self) -> str:
        answer = await self._stub.GenerateAll(pb.GenerationRequest(text="p", max_tokens=1), timeout=20)
        return str(answer.prompt)

    async def close(self) -> None:
        await self._channel.close()


@pytest.mark.parametrize(
    "make", [partial(Caller, Client), partial(Caller, AsyncClient), Stubs], ids=["threads", "asyncio", "stubs"]
)
async def test_no_call_fails_that_is_on_its_way_when_the_server_stops(make: Callable[[str], Any]) -> None:
    engine, settings = HeldEngine(), Settings(address="127.0.0.1:0", withdraw_window=0)
    calls: list[asyncio.Task[str]] = []
    async with AsyncExitStack() as stack:
        other = await stack.enter_async_context(serving(ScriptedEngine()))
        async with serve(engine, settings) as port:
            # Over a real network, a server cannot tell its callers at once that it stops.
            far = await stack.enter_async_context(through_a_cable(f"127.0.0.1:{port}", delay=0.02))
            one = make(f"ipv4:{far.address},{other.address}")
            stack.push_async_callback(one.close)
            while engine.calls < 3:
                await one.call()
            for _ in range(30):
                calls.append(asyncio.create_task(one.call()))
                await asyncio.sleep(0.002)
        for _ in range(30):
            calls.append(asyncio.create_task(one.call()))
            await asyncio.sleep(0.002)
        assert set(await asyncio.gather(*calls)) == {"p"}


@pytest.mark.parametrize("kind", [AsyncClient, *further([Client])], ids=["asyncio", "threads"])
async def test_after_a_kill_what_has_begun_is_told_and_what_has_not_is_tried_again(kind: Any) -> None:
    address = f"127.0.0.1:{free_ports(1)[0]}"
    async with servers(address, script='{"text": "abcd", "token_delay": 0.05, "slots": 5}') as running:
        one = Caller(kind, address, retry=PATIENT)
        begun = [await one.stream(max_tokens=4000) for _ in range(3)]
        for stream in begun:
            assert TEXT.startswith(await one.next(stream))

        async def unary(tokens: int, active: int, queued: int) -> list[asyncio.Task[Any]]:
            calls = [asyncio.create_task(one.ask(one.client.generate_all, "p", max_tokens=tokens)) for _ in range(2)]

            async def arrived() -> bool:
                stats = await one.ask(one.client.stats)
                return bool((stats.active, stats.queued) == (active, queued))

            await until(arrived, "the calls have arrived")
            return calls

        working = await unary(4000, active=5, queued=0)
        waiting = await unary(TOKENS, active=5, queued=2)
        await stopped(running[address], signal.SIGKILL)
        for stream in begun:
            with pytest.raises(UnavailableError):
                await one.rest(stream)
        for call in working:
            with pytest.raises(UnavailableError):
                await call
        streams = [await one.stream(max_tokens=TOKENS) for _ in range(3)]
        late = [asyncio.create_task(one.next(stream)) for stream in streams]
        running[address] = await started(address)
        assert {answer.responses[0].text for answer in await asyncio.gather(*waiting)} == {TEXT}
        # A server that has much to do at its start may merge the first tokens.
        assert all(text and TEXT.startswith(text) for text in await asyncio.gather(*late))
        await one.close()
