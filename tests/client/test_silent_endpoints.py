"""Endpoints that are listed and do not answer: in both clients, and in the command, they hold up no call."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import time
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, Self

import grpc
import pytest
import trustme
from flywheel_client import DeadlineExceededError, Retry, UnavailableError, _failover_sync, _health, _pool
from flywheel_client._health import MAX_PROBES, PROBE_TIMEOUT, answering

from tests.client.conftest import Caller, serving_fake, unavailable
from tests.client.fake_directory import FakeDirectory
from tests.serving import through_a_cable, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from tests.client.conftest import FakeService

SOON = PROBE_TIMEOUT - 1
"""Seconds within which a call is answered although other endpoints are silent. To try a silent endpoint takes longer."""

SETTINGS = bytes(3) + b"\x04" + bytes(5)
"""The frame that a server of HTTP/2 begins with."""

HURRY = [("grpc.min_reconnect_backoff_ms", 400)]


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def credentials(authority: trustme.CA) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(authority.cert_pem.bytes())


@pytest.fixture
def live(authority: trustme.CA) -> Iterator[FakeService]:
    """A server that speaks TLS."""
    certificate = authority.issue_cert("localhost")
    chain = b"".join(blob.bytes() for blob in certificate.cert_chain_pems)
    own = grpc.ssl_server_credentials([(certificate.private_key_pem.bytes(), chain)])
    with serving_fake(credentials=own, host="localhost") as fake:
        yield fake


class Silent:
    """Listens, and does less than a server should."""

    def __init__(self, kind: str, authority: trustme.CA) -> None:
        self._kind = kind
        self._tls: ssl.SSLContext | None = None
        self._backlog: list[socket.socket] = []
        self._writers: set[asyncio.StreamWriter] = set()
        self.open = self.most = self.accepted = 0
        if kind.startswith("TLS"):
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._tls.set_alpn_protocols(["http/1.1"] if "another protocol" in kind else ["h2"])
            issuer = trustme.CA() if "not trusted" in kind else authority
            issuer.issue_cert("localhost").configure_cert(self._tls)

    async def __aenter__(self) -> Self:
        listening = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.address = f"localhost:{listening.getsockname()[1]}"
        self._server: asyncio.Server | None = None
        if self._kind == "drops packets":
            # With a full backlog, the system drops the first packets of further connections.
            listening.listen(0)
            for _ in range(3):
                waiting = socket.socket()
                waiting.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    waiting.connect(listening.getsockname())
                self._backlog.append(waiting)
            self._backlog.append(listening)
        elif self._kind == "refuses connections":
            listening.close()
        else:
            self._server = await asyncio.start_server(self._accept, sock=listening, ssl=self._tls)
        return self

    async def __aexit__(self, *_: object) -> None:
        for each in self._backlog:
            each.close()
        if self._server is not None:
            self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        await until(lambda: not self._writers, "all connections are closed")

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        self.accepted += 1
        self.open += 1
        self.most = max(self.most, self.open)
        try:
            if self._kind == "closes at once":
                return
            if self._kind == "speaks something else":
                writer.write(b"SSH-2.0-OpenSSH_9.0\r\n")
            if "HTTP/2" in self._kind:
                writer.write(SETTINGS)
            while await reader.read(2**16):
                pass
        except OSError:
            pass
        finally:
            self.open -= 1
            writer.transport.abort()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
            self._writers.discard(writer)


KINDS = (
    "accepts and is silent",
    "drops packets",
    "refuses connections",
    "closes at once",
    "speaks something else",
    "TLS, then silence",
    "TLS, then HTTP/2 and silence",
    "TLS that is not trusted",
    "TLS with another protocol",
)


@pytest.fixture
async def silent(authority: trustme.CA) -> AsyncIterator[Callable[..., Any]]:
    async with AsyncExitStack() as stack:

        async def make(kind: str) -> Silent:
            return await stack.enter_async_context(Silent(kind, authority))

        yield make


@pytest.mark.parametrize("kind", KINDS)
async def test_an_endpoint_that_does_not_answer_holds_up_no_new_client(
    caller: Callable[..., Caller], silent: Any, live: FakeService, credentials: grpc.ChannelCredentials, kind: str
) -> None:
    bad = await silent(kind)
    for retry in (None, Retry()):
        one = caller(FakeDirectory(bad.address, live.address), credentials=credentials, timeout=10.0, retry=retry)
        begun = time.monotonic()
        assert await one.call() == "p"
        assert await one.next(await one.stream()) == "ab"
        assert time.monotonic() - begun < SOON
    assert len(live.requests) == 4


async def test_many_endpoints_that_do_not_answer_hold_up_no_new_client(
    caller: Callable[..., Caller], silent: Any, live: FakeService, credentials: grpc.ChannelCredentials
) -> None:
    """The silent endpoints are of every kind, and all stand before the live one in the list."""
    bad = [(await silent(kind)).address for kind in KINDS[:7]]
    one = caller(FakeDirectory(*bad, live.address), credentials=credentials, timeout=10.0)
    begun = time.monotonic()
    assert await asyncio.gather(*(one.call() for _ in range(16))) == ["p"] * 16
    assert time.monotonic() - begun < SOON
    assert len(live.requests) == 16


async def test_only_so_many_are_tried_at_the_same_time(
    caller: Callable[..., Caller],
    silent: Any,
    live: FakeService,
    credentials: grpc.ChannelCredentials,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (_failover_sync, _health):
        monkeypatch.setattr(module, "PROBE_TIMEOUT", 0.4)
    # One server at many addresses, which counts its connections.
    bad = await silent("accepts and is silent")
    port = int(bad.address.rpartition(":")[2])
    hosts = [f"127.0.{number // 250}.{number % 250 + 1}" for number in range(3 * MAX_PROBES)]
    listeners = [await asyncio.start_server(bad._accept, host, port) for host in hosts[1:]]
    directory = FakeDirectory(*(f"{host}:{port}" for host in hosts), live.address)
    one = caller(directory, credentials=credentials, timeout=20.0)
    assert await one.call() == "p"
    assert bad.accepted >= len(hosts)
    # grpc.aio closes some abandoned connections only when it has something else to do.
    assert bad.most <= 2 * MAX_PROBES
    for listener in listeners:
        listener.close()


@pytest.mark.parametrize("kind", ["accepts and is silent", "drops packets", "TLS, then HTTP/2 and silence"])
async def test_nothing_but_silence_ends_in_bounded_time(
    caller: Callable[..., Caller],
    silent: Any,
    credentials: grpc.ChannelCredentials,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    for module in (_failover_sync, _health):
        monkeypatch.setattr(module, "PROBE_TIMEOUT", 0.5)
    addresses = [(await silent(kind)).address for _ in range(4)]
    one = caller(FakeDirectory(*addresses), credentials=credentials, retry=None, channel_options=HURRY, timeout=30.0)
    begun = time.monotonic()
    if kind == "TLS, then HTTP/2 and silence":
        # The last endpoint has connected, so the call may be under way there: then the call ends with its deadline.
        with pytest.raises(Exception, match=r"deadline|failed to connect"):
            await one.call(timeout=2.0)
    else:
        with pytest.raises(UnavailableError, match="failed to connect"):
            await one.call()
    assert time.monotonic() - begun < 10


async def test_an_endpoint_that_falls_silent_holds_up_a_running_client_once(
    caller: Callable[..., Caller], silent: Any, fakes: list[FakeService]
) -> None:
    directory = FakeDirectory(fakes[0].address, fakes[1].address)
    one = caller(directory, timeout=10.0)
    for _ in range(4):
        await one.call()
    fakes[0].stop()
    begun = time.monotonic()
    for _ in range(8):
        assert await one.call() == "p"
    assert time.monotonic() - begun < SOON
    assert [len(fake.requests) for fake in fakes] == [2, 10, 0]


async def test_an_endpoint_that_answers_later_is_used_as_soon_as_it_does(
    caller: Callable[..., Caller], fakes: list[FakeService], monkeypatch: pytest.MonkeyPatch, free_port: int
) -> None:
    monkeypatch.setattr(_pool, "REFRESH_AFTER_SECONDS", 0.0)
    one = caller(FakeDirectory(f"127.0.0.1:{free_port}", fakes[0].address), timeout=10.0)
    assert await one.call() == "p"
    with serving_fake(port=free_port) as late:

        async def used() -> bool:
            await one.call()
            return bool(late.requests)

        await until(used, "it is used")
        await one.close()


async def test_closing_a_client_while_it_probes(
    caller: Callable[..., Caller], silent: Any, credentials: grpc.ChannelCredentials
) -> None:
    bad = [(await silent("accepts and is silent")).address for _ in range(3)]
    one = caller(FakeDirectory(*bad), credentials=credentials, timeout=10.0)
    waiting = asyncio.create_task(one.call())
    await until(lambda: bool(one.client._channels) and any(it.probing for it in one.pool._members.values()), "it probes")
    begun = time.monotonic()
    await one.close()
    with pytest.raises(Exception, match="cancelled"):
        await waiting
    assert time.monotonic() - begun < SOON


async def test_a_live_endpoint_among_fifty_is_found_within_the_time_of_one_probe(
    caller: Callable[..., Caller], silent: Any, fakes: list[FakeService]
) -> None:
    bad = await silent("accepts and is silent")
    port = int(bad.address.rpartition(":")[2])
    hosts = [f"127.0.0.{number}" for number in range(1, 51)]
    listeners = [await asyncio.start_server(bad._accept, host, port) for host in hosts[1:]]
    one = caller(FakeDirectory(*(f"{host}:{port}" for host in hosts), fakes[0].address), timeout=PROBE_TIMEOUT)
    begun = time.monotonic()
    assert await one.call() == "p"
    assert time.monotonic() - begun < SOON
    await one.close()
    for listener in listeners:
        listener.close()


@pytest.mark.parametrize("seconds", [0.25, 2.0])
async def test_a_call_in_a_hurry_does_not_wait_for_further_endpoints(
    caller: Callable[..., Caller], silent: Any, fakes: list[FakeService], monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    monkeypatch.setattr(_pool, "WARMUP_SECONDS", 2.5)
    bad = await silent("accepts and is silent")
    one = caller(FakeDirectory(bad.address, fakes[0].address), timeout=seconds)
    assert await one.call() == "p"


async def test_an_endpoint_whose_connection_falls_silent_costs_one_call(
    caller: Callable[..., Caller], fakes: list[FakeService]
) -> None:
    """If a machine hangs or has lost its network, only a call without an answer by its deadline tells of it."""
    async with through_a_cable(fakes[0].address) as cable:
        one = caller(FakeDirectory(cable.address, fakes[1].address), timeout=0.5)
        for _ in range(4):
            await one.call(timeout=10.0)
        cable.unplug()
        missed = 0
        for _ in range(8):
            try:
                assert await one.call() == "p"
            except DeadlineExceededError:
                missed += 1
        assert missed == 1
        await one.close()


async def test_a_deadline_that_passes_takes_no_endpoint_away_that_answers(
    caller: Callable[..., Caller], fakes: list[FakeService]
) -> None:
    fakes[0].holds = True
    one = caller(FakeDirectory(fakes[0].address), timeout=10.0)
    for _ in range(3):
        with pytest.raises(DeadlineExceededError):
            await one.call(timeout=0.1)
    fakes[0].holds = False
    assert await one.call() == "p"
    assert len(fakes[0].peers) == 1


async def test_failing_calls_do_not_ask_the_directory_again_and_again(
    caller: Callable[..., Caller], fakes: list[FakeService], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_pool, "MIN_READ_INTERVAL_SECONDS", 0.2)
    for fake in fakes[:2]:
        unavailable(fake)
    directory = FakeDirectory(fakes[0].address, fakes[1].address)
    one = caller(directory, timeout=10.0)
    end = time.monotonic() + 1

    async def call_on() -> None:
        while time.monotonic() < end:
            with pytest.raises(UnavailableError):
                await one.call()

    begun = time.monotonic()
    await asyncio.gather(*(call_on() for _ in range(8)))
    assert directory.readings <= (time.monotonic() - begun) / 0.2 + 1


async def test_a_deadline_that_passes_while_the_directory_is_read_does_not_hide_why_a_call_failed(
    caller: Callable[..., Caller], fakes: list[FakeService]
) -> None:
    unavailable(fakes[0])
    one = caller(FakeDirectory(fakes[0].address), timeout=10.0)
    with pytest.raises(UnavailableError, match="stopping"):
        await one.call(timeout=1.0)


async def test_an_endpoint_whose_answer_cannot_be_read_is_there() -> None:
    """A health service of another kind, as a proxy may have."""

    async def garbage(request: bytes, context: object) -> bytes:
        del request, context
        return b"\xff\xff"

    server = grpc.aio.server()
    method: dict[str, grpc.RpcMethodHandler[Any, Any]] = {"Check": grpc.unary_unary_rpc_method_handler(garbage)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("grpc.health.v1.Health", method)])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        assert await _health.probe(channel) == (None, False)
    await server.stop(None)


async def test_an_event_loop_that_stands_still_finds_the_answers_to_its_probes(
    fakes: list[FakeService], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_health, "PROBE_TIMEOUT", 0.3)
    async with grpc.aio.insecure_channel(fakes[0].address) as channel:
        await channel.channel_ready()
        probing = asyncio.create_task(_health.probe(channel))
        for _ in range(3):
            await asyncio.sleep(0)
        time.sleep(0.6)  # noqa: ASYNC251 - it is to stand still
        assert await probing == (None, False)


@pytest.mark.thorough
async def test_what_the_command_takes_for_live(silent: Any, live: FakeService, credentials: grpc.ChannelCredentials) -> None:
    bad = [(await silent(kind)).address for kind in KINDS]
    begun = time.monotonic()
    assert await answering([*bad, live.address, live.address], credentials) == {live.address}
    assert time.monotonic() - begun < 2 * PROBE_TIMEOUT + 1
