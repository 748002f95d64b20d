"""Modal's relay: public TLS in front of a container's plaintext port."""

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

import trustme
from grpclib import GRPCError, Status
from modal_proto import api_pb2

from tests.modal_cloud.container import Container
from tests.modal_cloud.state import calling_container

HOST = "localhost"


class Certificates:
    """A certificate authority of the cloud's own, and what its relays show."""

    def __init__(self) -> None:
        self._authority = trustme.CA()
        self._certificate = self._authority.issue_cert(HOST)

    @property
    def authority(self) -> bytes:
        """The authority's certificate, in PEM."""
        return self._authority.cert_pem.bytes()

    def context(self, *, h2: bool) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._certificate.configure_cert(context)
        if h2:
            context.set_alpn_protocols(["h2"])
        return context


class Relay:
    """A TLS listener that passes bytes on to a port, which is asked for at each connection."""

    def __init__(self, context: ssl.SSLContext, target: Callable[[], Awaitable[int]]) -> None:
        self._context = context
        self._target = target
        self._listener: asyncio.Server | None = None
        self._is_closed = False
        self._port = 0
        self._writers: set[asyncio.StreamWriter] = set()
        self._passes = asyncio.Event()
        self._passes.set()

    async def open(self) -> int:
        """Starts to listen, on the same port each time, and returns the port."""
        self._is_closed = False
        await self._listen(self._relay, self._context)
        return self._port

    def refuse_new(self) -> None:
        """Stops listening; connections go on."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def close(self) -> None:
        """Stops listening, and cuts the connections."""
        self._is_closed = True
        self.refuse_new()
        self.cut()
        self._passes.set()

    def cut(self) -> None:
        """Resets the existing connections."""
        for writer in self._writers:
            writer.transport.abort()

    async def silence(self) -> None:
        """Passes no more bytes on, in either direction: connections stay, and new ones are accepted but not answered."""
        self._passes.clear()
        if self._listener is not None:
            self._listener.close()
        await self._listen(self._ignore, None)

    async def restore(self) -> None:
        """Passes bytes on again; resets the connections that it accepted in silence."""
        self.close()
        await self.open()

    async def _listen(
        self, accept: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]], context: ssl.SSLContext | None
    ) -> None:
        self._listener = await asyncio.start_server(accept, "127.0.0.1", self._port, ssl=context)
        self._port = int(self._listener.sockets[0].getsockname()[1])
        if self._is_closed:  # while it began to listen
            self.refuse_new()

    async def _ignore(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        writer.transport.pause_reading()  # type: ignore[attr-defined]

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            onward_reader, onward_writer = await asyncio.open_connection("127.0.0.1", await self._target())
        except (OSError, GRPCError):
            self._writers.discard(writer)
            writer.transport.abort()
            return
        self._writers.add(onward_writer)
        try:
            await asyncio.gather(self._pump(reader, onward_writer), self._pump(onward_reader, writer))
        finally:
            self._writers -= {writer, onward_writer}
            for end in (writer, onward_writer):
                end.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(2**16):
                await self._passes.wait()
                writer.write(data)
                await writer.drain()
        writer.close()


@dataclass(eq=False)
class Tunnel:
    """A port of a container at a public address."""

    task_id: str
    container_port: int
    type: "api_pb2.TunnelType.ValueType"
    host: str
    port: int
    relay: Relay
    loop: asyncio.AbstractEventLoop
    open: bool = True

    def close(self) -> None:
        self.open = False
        self.relay.close()

    # Faults that neither Modal nor the container notices. Called from other threads than the cloud's.

    def cut(self) -> None:
        """Resets the existing connections; new ones are served."""
        self._do(self.relay.cut)

    def refuse(self) -> None:
        """Resets the connections, and refuses new ones."""
        self._do(self.relay.close)

    def refuse_new(self) -> None:
        """Refuses new connections; existing connections go on."""
        self._do(self.relay.refuse_new)

    def silence(self) -> None:
        """Passes no more bytes on: connections stay, and new ones are accepted, but nothing answers."""
        asyncio.run_coroutine_threadsafe(self.relay.silence(), self.loop).result(10)

    def restore(self) -> None:
        """Ends the fault."""
        asyncio.run_coroutine_threadsafe(self.relay.restore(), self.loop).result(10)

    def _do(self, what: Callable[[], None]) -> None:
        async def do() -> None:
            what()

        asyncio.run_coroutine_threadsafe(do(), self.loop).result(10)


class Tunnels:
    """Plays the RPCs of `modal.forward`."""

    def __init__(self, certificates: Certificates) -> None:
        self._certificates = certificates
        self.all: list[Tunnel] = []

    def _open(self, container: Container, port: int) -> Tunnel | None:
        tunnels = (tunnel for tunnel in self.all if (tunnel.task_id, tunnel.container_port) == (container.task_id, port))
        return next((tunnel for tunnel in tunnels if tunnel.open), None)

    async def TunnelStart(self, request: api_pb2.TunnelStartRequest) -> api_pb2.TunnelStartResponse:
        container = calling_container()
        if request.unencrypted:
            raise GRPCError(Status.UNIMPLEMENTED, "the stand-in of Modal's cloud has no unencrypted tunnels")
        if self._open(container, request.port) is not None:
            raise GRPCError(Status.ALREADY_EXISTS, f"port {request.port} is forwarded already")

        async def target() -> int:
            return request.port

        relay = Relay(self._certificates.context(h2=request.tunnel_type == api_pb2.TUNNEL_TYPE_H2), target)
        container.at_exit.append(relay.close)
        port, loop = await relay.open(), asyncio.get_running_loop()
        tunnel = Tunnel(container.task_id, request.port, request.tunnel_type, HOST, port, relay, loop)
        self.all.append(tunnel)
        container.at_exit.append(tunnel.close)
        return api_pb2.TunnelStartResponse(host=tunnel.host, port=tunnel.port)

    async def TunnelStop(self, request: api_pb2.TunnelStopRequest) -> api_pb2.TunnelStopResponse:
        tunnel = self._open(calling_container(), request.port)
        if tunnel is not None:
            tunnel.close()
        return api_pb2.TunnelStopResponse(exists=tunnel is not None)
