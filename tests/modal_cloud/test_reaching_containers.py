"""Callers reach containers of the stand-in of Modal's cloud through tunnels, at URLs and over the web."""

import asyncio
import socket
import ssl
from contextlib import suppress

import modal
import pytest
from modal_proto import api_pb2

from tests.modal_cloud import ModalCloud, Tunnel
from tests.serving import until

pytestmark = pytest.mark.thorough
"""Tests of gateways and of their page, which `make test` runs, reach containers by each of these ways."""


def speak(cloud: ModalCloud, port: int, alpn: list[str]) -> tuple[str | None, bytes]:
    """Returns the protocol and the answer through a relay."""
    context = ssl.create_default_context(cadata=cloud.ca_certificate.decode())
    context.set_alpn_protocols(alpn)
    with socket.create_connection(("localhost", port)) as plain, context.wrap_socket(plain, server_hostname="localhost") as tls:
        tls.sendall(b"hello")
        return tls.selected_alpn_protocol(), tls.recv(5)


async def test_tunnels_live_as_long_as_their_container(cloud: ModalCloud) -> None:
    await until(lambda: len(cloud.tunnels) == 2, "the tunnels are open")
    h2, plain = cloud.tunnels
    assert (h2.type, plain.type) == (api_pb2.TUNNEL_TYPE_H2, api_pb2.TUNNEL_TYPE_UNSPECIFIED)
    assert await asyncio.to_thread(speak, cloud, h2.port, ["h2"]) == ("h2", b"hello")
    assert await asyncio.to_thread(speak, cloud, plain.port, ["h2"]) == (None, b"hello")
    (gateway,) = cloud.containers("Gateway")
    gateway.interrupt()
    assert await asyncio.to_thread(gateway.wait) == 0
    assert gateway.output() == "entered\nleft\n"
    assert not h2.open
    with pytest.raises(OSError, match="refused"):
        speak(cloud, h2.port, ["h2"])
    await until(lambda: len(cloud.tunnels) == 4, "another container has replaced it")


async def test_a_tunnel_may_be_cut_or_refuse_or_fall_silent(cloud: ModalCloud) -> None:
    (gateway,) = cloud.containers("Gateway")

    def tunnels() -> list[Tunnel]:
        return [tunnel for tunnel in cloud.tunnels if tunnel.open and tunnel.task_id == gateway.task_id]

    await until(lambda: len(tunnels()) == 2, "the tunnels are open")
    await asyncio.to_thread(_befall, cloud, tunnels()[0])


def _befall(cloud: ModalCloud, tunnel: Tunnel) -> None:
    context = ssl.create_default_context(cadata=cloud.ca_certificate.decode())

    def connected() -> ssl.SSLSocket:
        return context.wrap_socket(socket.create_connection(("localhost", tunnel.port), 1), server_hostname="localhost")

    def echo(connection: ssl.SSLSocket) -> bytes:
        with suppress(ConnectionError, ssl.SSLEOFError):
            connection.sendall(b"hello")
            return connection.recv(5)
        return b""

    with connected() as connection:
        assert echo(connection) == b"hello"
        tunnel.cut()
        assert echo(connection) == b""
    with connected() as connection:
        assert echo(connection) == b"hello"
        tunnel.silence()
        with pytest.raises(TimeoutError):
            echo(connection)
        with pytest.raises(TimeoutError):
            connected()
        tunnel.restore()
    tunnel.refuse()
    with pytest.raises(ConnectionRefusedError):
        connected()
    assert tunnel.open, "nobody was told"
    tunnel.restore()
    with connected() as connection:
        assert echo(connection) == b"hello"


async def test_a_server_is_reached_at_its_url(cloud: ModalCloud, client: modal.Client) -> None:
    url = await modal.Server.from_name("sample", "GatewayServer", client=client).get_url.aio()
    assert url is not None
    port = int(url.removeprefix("https://localhost:"))
    for _ in range(2):
        assert await asyncio.to_thread(speak, cloud, port, ["h2"]) == ("h2", b"hello")
        (server,) = cloud.containers("GatewayServer")
        server.interrupt()
        assert await asyncio.to_thread(server.wait) == 0
        assert "left" in server.output()


async def test_web_functions_answer(cloud: ModalCloud) -> None:
    status, headers, body = await asyncio.to_thread(cloud.web_get, "web", "/path?query=1")
    assert (status, headers["content-type"], body) == (203, "text/plain", b"/path?query=1")
