"""Addresses: which a client takes, what it says of the others, and which it calls without the proxy of the environment."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from flywheel_client import AsyncClient, Client, FlywheelError
from flywheel_client._health import answering

from tests.client.command import FLYWHEEL
from tests.client.conftest import WAIT, serving_fake
from tests.client.fake_directory import FakeDirectory
from tests.thorough import further

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from grpc_health.v1.health import HealthServicer

    from tests.client.conftest import Caller, FakeService

TARGETS = (
    "localhost:50051",
    "localhost:1",
    "localhost:65535",
    "my_host-1.example.com.:50051",
    "bücher.example:50051",
    "10.0.0.1:50051",
    "0.0.0.0:50051",
    "[::1]:50051",
    "[fe80::1%eth0]:50051",
    "dns:localhost:50051",
    "dns:///localhost:50051",
    "dns:///localhost",
    "dns:///[::1]:50051",
    "dns://8.8.8.8/localhost:50051",
    "ipv4:10.0.0.1:50051",
    "ipv4:///10.0.0.1:50051",
    "ipv4:10.0.0.1:50051,10.0.0.2:50051",
    "ipv6:[::1]:50051",
    "ipv6:%5B::1%5D:50051,[fe80::1%25eth0]:50051",
    "unix:relative/path with spaces",
    "unix:///run/flywheel.sock",
    "unix-abstract:flywheel",
    "vsock:2:50051",
    "xds:///flywheel",
    "google-c2p:///flywheel",
)
NO_TARGETS: dict[Any, str] = {
    "": "it is empty",
    "http://localhost:50051": "leave out http://",
    "https://flywheel.example/": "leave out https://",
    "grpc://localhost:50051": "leave out grpc://",
    "grpcs://localhost:50051": "leave out grpcs://",
    "localhost": "the port is missing",
    "localhost:": "the port is missing",
    "[::1]": "the port is missing",
    ":50051": "the host is missing",
    "/run/flywheel.sock": "the host is missing",
    "localhost:0": "the port must be 1 to 65535",
    "localhost:65536": "the port must be 1 to 65535",
    "localhost:-1": "the port must be 1 to 65535",
    "localhost:port": "the port must be 1 to 65535",
    "localhost:\N{ARABIC-INDIC DIGIT FIVE}": "the port must be 1 to 65535",
    "localhost:50051/": "the port must be 1 to 65535",
    "localhost:50051/path": "the port must be 1 to 65535",
    "user@localhost:50051": "the port must be 1 to 65535",
    "localhost:50051,localhost:50052": "needs brackets",
    "::1:50051": "needs brackets",
    "[localhost]:50051": "only an IPv6 address has brackets",
    " localhost:50051": "spaces",
    "localhost:50051\n": "spaces or control characters",
    "local host:50051": "spaces",
    "localhost\x00:50051": "control characters",
    "dns:": "nothing follows dns:",
    "dns:///": "nothing follows dns:",
    "dns://localhost:50051": "nothing follows dns:",
    "dns:///localhost:99999": "the port must be 1 to 65535",
    "ipv4:localhost:50051": "not an IP address",
    "ipv4:10.0.0.1": "the port of '10.0.0.1'",
    "ipv4:10.0.0.1:50051,": "'' is not an IP address",
    "ipv6:::1:50051": "not an IP address",
    "unix:": "nothing follows unix:",
    "xds:///": "nothing follows xds:",
    None: "not None",
    b"localhost:50051": "not b'localhost:50051'",
    Path("localhost:50051"): "not PosixPath",
    50051: "not 50051",
    ("localhost", 50051): "not ('localhost', 50051)",
}
KINDS = (Client, AsyncClient)


@pytest.mark.parametrize("kind", KINDS)
def test_every_target_of_grpc_is_taken(kind: Any) -> None:
    for target in TARGETS:
        kind(target)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_target_is_refused_with_what_one_looks_like(kind: Any) -> None:
    for address, problem in NO_TARGETS.items():
        with pytest.raises(ValueError if isinstance(address, str) else TypeError) as caught:
            kind(address)
        assert "HOST:PORT" in str(caught.value)
        assert repr(address) in str(caught.value)
        assert problem in str(caught.value), address


HTTP = "http://localhost:50051"
GIVEN = [
    (where, address) for where in ("option", "variable") for address in (HTTP, "localhost", "localhost:99999", "::1:50051")
]
BLANK = ("option", " ")
"""A blank variable counts as not set."""


@pytest.mark.parametrize("given", [GIVEN[0], *further([*GIVEN[1:], BLANK])], ids=" ".join)
@pytest.mark.parametrize("command", [("stats",), *further([("generate", "p"), ("model",), ("health",)])], ids=str)
def test_the_command_refuses_the_same_addresses(command: tuple[str, ...], given: tuple[str, str]) -> None:
    where, address = given
    variable = {"FLYWHEEL_ADDRESS": address} if where == "variable" else {}
    option = ["--address", address] if where == "option" else []
    process = subprocess.run(
        [*FLYWHEEL, *command, *option], capture_output=True, env=os.environ | variable, timeout=WAIT, check=False
    )
    assert process.returncode == 2
    assert process.stderr.startswith(b"flywheel: the address must be HOST:PORT")
    assert repr(address).encode() in process.stderr
    assert b"Traceback" not in process.stderr


class Proxy:
    """A proxy that records which targets it is asked for, and connects to the same port of this machine."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.listening = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self.url = f"http://127.0.0.1:{self.listening.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                accepted, _ = self.listening.accept()
                threading.Thread(target=self._serve, args=(accepted,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with suppress(OSError):
            request = b""
            while b"\r\n\r\n" not in request:
                request += client.recv(4096)
            name = request.split()[1].decode()
            self.asked.append(name)
            server = socket.create_connection(("127.0.0.1", int(name.rpartition(":")[2])))
            self._sockets += [client, server]
            client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            threading.Thread(target=self._pump, args=(server, client), daemon=True).start()
            self._pump(client, server)

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(2**16):
                sink.sendall(data)

    def close(self) -> None:
        self.listening.shutdown(socket.SHUT_RDWR)
        for each in (self.listening, *self._sockets):
            each.close()


@contextmanager
def proxied(monkeypatch: pytest.MonkeyPatch, *variables: str) -> Iterator[Proxy]:
    proxy = Proxy()
    for name in ("http_proxy", "https_proxy", "grpc_proxy", "no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in variables:
        monkeypatch.setenv(name, proxy.url)
    try:
        yield proxy
    finally:
        proxy.close()


LOCAL = (
    "127.0.0.1:{0}",
    "localhost:{0}",
    "0.0.0.0:{0}",
    "[::ffff:127.0.0.1]:{0}",
    "dns:localhost:{0}",
    "dns:///LocalHost:{0}",
    "ipv4:127.0.0.1:{0}",
    "ipv4:///127.0.0.1:{0}",
    "ipv4:127.0.0.1:{0},127.0.0.1:{1}",
    "ipv4:192.0.2.1:1,127.0.0.1:{0}",
    "ipv6:[::ffff:127.0.0.1]:{0}",
)


@pytest.mark.parametrize("variable", ["http_proxy", *further(["https_proxy", "grpc_proxy"])])
async def test_this_machine_is_called_without_a_proxy(
    caller: Callable[..., Caller], fake: FakeService, health: HealthServicer, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    with proxied(monkeypatch, variable) as proxy, serving_fake(health) as other:
        ports = [each.address.rpartition(":")[2] for each in (fake, other)]
        for target in LOCAL:
            one = caller(target.format(*ports), wait_for_ready=True, timeout=WAIT)
            assert await one.call() == "p", target
            assert await one.ask(one.client.health) == "SERVING"
        one = caller(FakeDirectory(fake.address, other.address))
        assert await one.call() == "p"
        assert proxy.asked == []


async def test_sockets_of_this_machine_have_no_proxy(caller: Callable[..., Caller], monkeypatch: pytest.MonkeyPatch) -> None:
    with proxied(monkeypatch, "http_proxy") as proxy:
        for target in ("unix:/nowhere/flywheel.sock", "unix-abstract:flywheel-nowhere", "[::1]:1", "ipv6:[::1]:1"):
            await caller(target, retry=None).expect(FlywheelError)
        assert proxy.asked == []


async def test_other_machines_are_called_through_the_proxy(
    caller: Callable[..., Caller], fake: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = fake.address.rpartition(":")[2]
    with proxied(monkeypatch, "http_proxy") as proxy:
        for host in ("flywheel.invalid", "localhost.invalid", "192.0.2.1"):
            assert await caller(f"{host}:{port}").call() == "p"
            assert proxy.asked.pop() == f"{host}:{port}"
        monkeypatch.setenv("no_proxy", "flywheel.invalid")
        await caller(f"flywheel.invalid:{port}", retry=None).expect(FlywheelError, "resolv|lookup|DNS")
        assert proxy.asked == []


@pytest.mark.parametrize(
    ("options", "variable"),
    [([("grpc.enable_http_proxy", 1)], "http_proxy"), ([("grpc.http_proxy", "")], "grpc_proxy")],
    ids=["enable_http_proxy", "http_proxy"],
)
async def test_options_of_the_caller_win(
    caller: Callable[..., Caller],
    fake: FakeService,
    monkeypatch: pytest.MonkeyPatch,
    options: list[tuple[str, Any]],
    variable: str,
) -> None:
    with proxied(monkeypatch, variable) as proxy:
        options = [(name, value or proxy.url) for name, value in options]
        assert await caller(fake.address, channel_options=options).call() == "p"
        assert proxy.asked == [fake.address]


async def test_probes_of_this_machine_have_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    with proxied(monkeypatch, "https_proxy") as proxy:
        assert await answering(["localhost:1", "[::1]:1"], grpc.ssl_channel_credentials()) == set()
        assert proxy.asked == []


def test_the_command_calls_this_machine_without_a_proxy(fake: FakeService) -> None:
    environment = os.environ | {"FLYWHEEL_ADDRESS": fake.address, "http_proxy": "http://127.0.0.1:1"}
    process = subprocess.run([*FLYWHEEL, "health"], capture_output=True, env=environment, timeout=WAIT, check=False)
    assert (process.returncode, process.stdout) == (0, b"SERVING\n")
