"""How often the engine begins on one call whose connections, servers and engines fail: its cost, counted in the engine."""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import socket
import sys
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import pytest
from flywheel_client import SERVICE_CONFIG, FlywheelError, Retry, UnavailableError
from flywheel_proto.v1 import generation_pb2, generation_pb2_grpc
from flywheel_server.engines.base import Started, TextDelta
from flywheel_server.engines.scripted import Script
from flywheel_server.interceptors.context import CallContext

from tests.client.conftest import WAIT
from tests.client.fake_directory import FakeDirectory
from tests.pulled import PulledEngine
from tests.serving import drained, serving, until
from tests.thorough import further

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from flywheel_server.engines.base import PreparedRequest

    from tests.client.conftest import Caller

METHODS = ("generate", "generate_deltas", "generate_all")
RPCS = ("Generate", "GenerateDeltas", "GenerateAll")
RETRIES = {1: None, 2: Retry(max_attempts=2, initial_backoff=0.01), 5: Retry(initial_backoff=0.01)}
"""The retries of a client, by the number of times that they allow it to send a call."""
OWN_CONNECTIONS = [("grpc.use_local_subchannel_pool", 1)]
"""Without this, a client may share the connection of an earlier client, which is just ending."""
TARGETS: dict[str, Callable[[list[str]], Any]] = {
    "one address": lambda addresses: addresses[0],
    "two addresses": lambda addresses: "ipv4:" + ",".join(addresses[:2]),
    "a directory of three": lambda addresses: FakeDirectory(*addresses),
}


class CountingEngine(PulledEngine):
    """Counts how often it begins on a request, and tells the lines of a `Fleet` when to fail."""

    begun = 0

    def __init__(self, script: Script) -> None:
        super().__init__(script)
        self.on_start: Callable[[], None] = lambda: None
        """Called when the engine begins, before the headers are sent."""
        self.on_delta: dict[int, Callable[[], object]] = {}
        """Called when the engine has made this number of deltas. The headers are sent before the first delta."""
        self.headers_sent = 0

    async def events(self, prepared: PreparedRequest) -> Any:
        """Yields the events of the script."""
        deltas = 0
        async for event in super().events(prepared):
            if isinstance(event, Started):
                self.begun += 1
                self.on_start()
            yield event
            if isinstance(event, Started):
                await until(lambda: self.headers_sent == self.begun, "the headers have been sent")
            if isinstance(event, Started | TextDelta):
                self.on_delta.get(deltas, lambda: None)()
                deltas += 1


class Line:
    """Carries connections to a server: what either end sends, in order, and then the end of the connection."""

    def __init__(self, onward: str) -> None:
        self._onward = onward
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._listening.setblocking(False)
        self._clients: list[asyncio.StreamWriter] = []
        self._servers: list[asyncio.StreamWriter] = []
        self._connections: list[asyncio.Task[None]] = []
        # Not asyncio.start_server: closing it loses a connection that has just been accepted (cpython#109564).
        asyncio.get_running_loop().add_reader(self._listening, self._accept)

    @property
    def address(self) -> str:
        """Leads to the server."""
        return "{}:{}".format(*self._listening.getsockname())

    def _accept(self) -> None:
        with suppress(BlockingIOError):
            accepted, _ = self._listening.accept()
            accepted.setblocking(False)
            self._connections.append(asyncio.create_task(self._connect(accepted)))

    async def _connect(self, accepted: socket.socket) -> None:
        host, _, port = self._onward.rpartition(":")
        reader, writer = await asyncio.open_connection(sock=accepted)
        self._clients.append(writer)
        onward_reader, onward_writer = await asyncio.open_connection(host, int(port))
        self._servers.append(onward_writer)
        await asyncio.gather(_pump(reader, onward_writer), _pump(onward_reader, writer))
        for each in (writer, onward_writer):
            each.transport.abort()

    def hang_up(self) -> None:
        """Ends every connection after the clients have got all that the server has sent."""
        for writer in self._servers:
            _end(writer)

    def cut(self) -> None:
        """Ends every connection; the clients get nothing more."""
        for writer in self._clients:
            writer.transport.abort()

    async def close(self) -> None:
        """Ends everything; the server must still be there."""
        asyncio.get_running_loop().remove_reader(self._listening)
        self._listening.close()
        while any(not connection.done() for connection in self._connections):
            for writer in (*self._clients, *self._servers):
                writer.transport.abort()
            await asyncio.wait(self._connections, timeout=0.01)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError, RuntimeError):
        while data := await reader.read(2**16):
            writer.write(data)
            await writer.drain()
    _end(writer)


def _end(writer: asyncio.StreamWriter) -> None:
    with suppress(OSError, RuntimeError):
        writer.write_eof()


@dataclass
class Fleet:
    """Three addresses of a server of one engine, each at the end of a line."""

    engine: CountingEngine
    lines: list[Line] = field(default_factory=list)
    addresses: list[str] = field(default_factory=list)

    def hang_up(self) -> None:
        for line in self.lines:
            line.hang_up()

    def cut(self) -> None:
        for line in self.lines:
            line.cut()

    def begun_since(self, before: int) -> int:
        return self.engine.begun - before


@asynccontextmanager
async def fleet(script: Script) -> AsyncIterator[Fleet]:
    engine = CountingEngine(script)
    made = Fleet(engine)

    def send_and_count(context: CallContext) -> None:
        begin(context)
        engine.headers_sent += 1

    begin = CallContext.begin
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CallContext, "begin", send_and_count)
        async with serving(engine) as target, AsyncExitStack() as stack:
            for _ in range(3):
                line = Line(target.address)
                stack.push_async_callback(line.close)
                made.lines.append(line)
                made.addresses.append(line.address)
            yield made


HANGS = Script(hang_after=0)
FAILURES: dict[str, tuple[Script, Callable[[Fleet], object]]] = {
    "the connection ends": (HANGS, lambda fleet: fleet.engine.on_delta.update({0: fleet.hang_up})),
    "the connection ends later": (Script(token_delay=0.02), lambda fleet: fleet.engine.on_delta.update({3: fleet.hang_up})),
    "the engine is gone": (Script(fail_after=0, failure="unavailable"), lambda _: None),
    "the engine is gone later": (Script(fail_after=3, failure="unavailable"), lambda _: None),
    "the engine is full": (Script(fail_after=0, failure="overloaded"), lambda _: None),
}
"""What happens to calls after their headers have been sent. Before the headers, it would be a reason for another try."""
AT_ONCE = ("the connection ends", "the engine is gone", "the engine is full")


async def call(one: Caller, method: str) -> None:
    """Makes a call, and reads the answer to its end."""
    function = functools.partial(getattr(one.client, method), "p", max_tokens=100, timeout=WAIT)
    if method == "generate_all":
        await one.ask(function)
    else:
        # A call may wait for a server that answers. The servers run on this event loop, so the call begins in a thread.
        await one.rest(function() if one.is_async else await asyncio.to_thread(function))


@pytest.mark.parametrize("target", ["a directory of three", *further(["one address", "two addresses"])])
@pytest.mark.parametrize("failure", FAILURES)
async def test_a_call_that_has_begun_begins_once(caller: Callable[..., Caller], target: str, failure: str) -> None:
    script, prepare = FAILURES[failure]
    async with fleet(script) as servers:
        prepare(servers)
        for (attempts, retry), method in itertools.product(RETRIES.items(), METHODS):
            one = caller(TARGETS[target](servers.addresses), retry=retry, wait_for_ready=True, channel_options=OWN_CONNECTIONS)
            before = servers.engine.begun
            with pytest.raises(FlywheelError) as caught:
                await call(one, method)
            assert caught.value.code in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED}
            # grpc.aio loses the headers of a stream that ends before the event loop has turned round.
            loses_headers = one.is_async and method != "generate_all" and failure in AT_ONCE
            assert 1 <= servers.begun_since(before) <= (attempts if loses_headers else 1), (retry, method)
            await one.close()


@pytest.mark.parametrize("target", ["two addresses", *further(["one address", "a directory of three"])])
async def test_a_call_whose_headers_are_lost_begins_as_often_as_it_may_be_sent(
    caller: Callable[..., Caller], target: str
) -> None:
    async with fleet(HANGS) as servers:
        servers.engine.on_start = servers.cut
        for (attempts, retry), method in itertools.product(RETRIES.items(), METHODS):
            one = caller(TARGETS[target](servers.addresses), retry=retry, wait_for_ready=True, channel_options=OWN_CONNECTIONS)
            before = servers.engine.begun
            with pytest.raises(UnavailableError):
                await call(one, method)
            # A try is also lost if it meets a connection to another address that has ended without being noticed.
            least = attempts if target == "one address" else 1
            assert least <= servers.begun_since(before) <= attempts, method
            await one.close()


async def test_a_reset_after_the_headers_ends_the_call(caller: Callable[..., Caller]) -> None:
    async with fleet(HANGS) as servers:
        # Long enough for the client to have read the headers, which nothing reports: a reset would discard unread headers.
        loop = asyncio.get_running_loop()
        servers.engine.on_delta[0] = lambda: loop.call_later(0.5, servers.cut)
        one = caller(FakeDirectory(*servers.addresses))
        calls = [asyncio.create_task(call(one, method)) for method in METHODS]
        for each in calls:
            with pytest.raises(UnavailableError):
                await each
        assert servers.engine.begun == len(METHODS)
        await one.close()


def dead_addresses(number: int) -> list[str]:
    """Returns addresses at which nothing listens."""
    sockets = [socket.socket() for _ in range(number)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
    for each in sockets:
        each.close()
    return addresses


async def test_addresses_where_nothing_listens_are_passed_over(caller: Callable[..., Caller]) -> None:
    async with fleet(Script()) as servers:
        directory = FakeDirectory(*dead_addresses(7), servers.addresses[0])
        for attempts in (1, 2):
            one = caller(directory, retry=Retry(max_attempts=attempts, initial_backoff=0.01))
            for method in METHODS:
                await call(one, method)
        assert servers.engine.begun == 2 * len(METHODS)
        await call(caller(directory, retry=None), "generate_all")


async def test_a_directory_of_dead_addresses_is_tried_once_per_attempt(caller: Callable[..., Caller]) -> None:
    directory = FakeDirectory(*dead_addresses(3))
    one = caller(directory, retry=Retry(max_attempts=3, initial_backoff=0.01))
    with pytest.raises(UnavailableError, match="failed to connect"):
        await call(one, "generate_all")
    # A round has a second reading if the call itself, and not a probe, finds that the last address is dead.
    assert 3 <= directory.readings <= 6


async def test_dead_and_failing_endpoints_together_cost_no_more(caller: Callable[..., Caller]) -> None:
    async with fleet(HANGS) as servers:
        servers.engine.on_start = servers.cut
        for attempts, retry in RETRIES.items():
            one = caller(FakeDirectory(servers.addresses[0], *dead_addresses(1), *servers.addresses[1:]), retry=retry)
            for method in METHODS:
                before = servers.engine.begun
                with pytest.raises(UnavailableError):
                    await call(one, method)
                assert servers.begun_since(before) <= attempts, method
            await one.close()


@pytest.mark.parametrize("arguments", [(), ("--json",)], ids=str)
async def test_the_command_begins_once(arguments: tuple[str, ...]) -> None:
    async with fleet(HANGS) as servers:
        servers.engine.on_delta[0] = servers.hang_up
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "flywheel_client", "generate", "p", *arguments),
            env=os.environ | {"FLYWHEEL_ADDRESS": "ipv4:" + ",".join(servers.addresses)},
            stderr=asyncio.subprocess.PIPE,
        )
        _, errors = await asyncio.wait_for(process.communicate(), WAIT)
        assert b"UNAVAILABLE" in errors
        assert process.returncode == 1
        assert servers.engine.begun == 1


@pytest.mark.parametrize("rpc", [RPCS[0], *further(RPCS[1:])])
@pytest.mark.parametrize("is_async", [False, True], ids=["threads", "asyncio"])
async def test_stubs_of_your_own_repeat_only_what_has_not_begun(rpc: str, is_async: bool) -> None:
    request = generation_pb2.GenerationRequest(text="p", max_tokens=100)
    options = [("grpc.service_config", SERVICE_CONFIG)]

    async def fails(address: str) -> None:
        if is_async:
            async with grpc.aio.insecure_channel(address, options) as async_channel:
                method = getattr(generation_pb2_grpc.GenerationServiceStub(async_channel), rpc)
                with pytest.raises(grpc.RpcError):
                    await drained(method(request, timeout=WAIT, wait_for_ready=True))
            return
        with grpc.insecure_channel(address, options) as channel:
            method = getattr(generation_pb2_grpc.GenerationServiceStub(channel), rpc)

            def ask() -> None:
                answer = method(request, timeout=WAIT, wait_for_ready=True)
                for _ in answer if rpc != "GenerateAll" else ():
                    pass

            with pytest.raises(grpc.RpcError):
                await asyncio.to_thread(ask)

    for script, prepare in FAILURES.values():
        async with fleet(script) as servers:
            prepare(servers)
            await fails("ipv4:" + ",".join(servers.addresses))
            assert servers.engine.begun == 1
    async with fleet(HANGS) as servers:
        servers.engine.on_start = servers.cut
        await fails(servers.addresses[0])
        assert servers.engine.begun == 4
