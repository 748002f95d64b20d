"""The gRPC server: finds the room that plays an RPC, and applies the faults."""

import inspect
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any, cast

from google.protobuf.message_factory import GetMessageClass
from grpclib import GRPCError, Status
from grpclib.config import Configuration
from grpclib.const import Cardinality, Handler
from grpclib.protocol import H2Protocol
from grpclib.server import Server, Stream
from h2.settings import SettingCodes
from modal_proto import api_pb2

from tests.modal_cloud.container import Container
from tests.modal_cloud.faults import Faults
from tests.modal_cloud.state import calling

SERVICE = api_pb2.DESCRIPTOR.services_by_name["ModalClient"]
# On Modal, a container reaches these through its worker, whatever happens to the control plane.
OF_THE_WORKER = (
    "Container",
    "Task",
    "FunctionGetInputs",
    "FunctionPutOutputs",
    "FunctionGetDynamicConcurrency",
    "FunctionCallPutDataOut",
)
ACKNOWLEDGED = {"ContainerHello"}  # nothing is to be done


class _Protocol(H2Protocol):
    """An HTTP/2 connection that says how many streams it has room for: each call that waits is one."""

    max_streams: int

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.connection._connection.update_settings({SettingCodes.MAX_CONCURRENT_STREAMS: self.max_streams})
        self.connection.flush()


class _Server(Server):
    """A server that can cut its connections."""

    def __init__(self, handlers: Any, max_streams: int) -> None:
        self._max_streams = max_streams
        super().__init__(handlers, config=Configuration(http2_connection_window_size=2**26, http2_stream_window_size=2**25))
        self._protocols: list[H2Protocol] = []

    def _protocol_factory(self) -> H2Protocol:
        protocol = super()._protocol_factory()
        limited = _Protocol(protocol.handler, protocol.config, protocol.h2_config)
        limited.max_streams = self._max_streams
        self._protocols.append(limited)
        return limited

    async def stop(self) -> None:
        self.close()
        for protocol in self._protocols:
            if hasattr(protocol, "processor"):
                protocol.processor.close("the control plane went away")
        await self.wait_closed()


class ControlPlane:
    """The service as clients and containers reach it, each at an address of its own."""

    def __init__(self, rooms: Sequence[object], container: Callable[[str], Container | None], max_streams: int) -> None:
        self._max_streams = max_streams
        self._rooms = rooms
        self._container = container
        self._for_clients: _Server | None = None
        self._for_containers: _Server | None = None
        self._port = 0
        self.rpcs: Counter[str] = Counter()
        self.unimplemented: set[str] = set()
        self.faults = Faults()

    def __mapping__(self) -> dict[str, Handler]:
        return {
            f"/{SERVICE.full_name}/{method.name}": Handler(
                self._play(method),
                Cardinality.UNARY_STREAM if method.server_streaming else Cardinality.UNARY_UNARY,
                GetMessageClass(method.input_type),
                GetMessageClass(method.output_type),
            )
            for method in SERVICE.methods
        }

    def _play(self, method: Any) -> Callable[[Stream[Any, Any]], Awaitable[None]]:
        name = method.name
        play = next((getattr(room, name) for room in self._rooms if hasattr(room, name)), None)

        async def acknowledge(request: Any) -> Any:
            return GetMessageClass(method.output_type)()

        if name in ACKNOWLEDGED:
            play = acknowledge

        async def handle(stream: Stream[Any, Any]) -> None:
            self.rpcs[name] += 1
            if play is None:
                self.unimplemented.add(name)
                raise GRPCError(Status.UNIMPLEMENTED, f"the stand-in of Modal's cloud does not play {name}")
            container = self._container(str(cast("Any", stream.metadata or {}).get("x-task-id", "")))
            await self._admit(name, container)
            calling.set(container)
            answer = play(await stream.recv_message())
            if not inspect.isasyncgen(answer):
                message = await answer
                await self.faults.meet(name, of_a_container=container is not None, of_answers=True)
                await stream.send_message(message)
                return
            async with aclosing(cast("AsyncGenerator[Any, None]", answer)) as messages:
                async for message in messages:
                    await stream.send_message(message)

        return handle

    async def _admit(self, name: str, container: Container | None) -> None:
        if container is not None and self._for_clients is None and not name.startswith(OF_THE_WORKER):
            raise GRPCError(Status.UNAVAILABLE, "the control plane is down")
        await self.faults.meet(name, of_a_container=container is not None)

    async def start(self) -> None:
        self._for_containers = _Server([self], self._max_streams)
        await self._for_containers.start("127.0.0.1", 0)
        await self.up()

    async def up(self) -> None:
        """Listens for clients, on the same port each time."""
        if self._for_clients is None:
            self._for_clients = _Server([self], self._max_streams)
            await self._for_clients.start("127.0.0.1", self._port)
            self._port = _port(self._for_clients)

    async def down(self) -> None:
        if self._for_clients is not None:
            server, self._for_clients = self._for_clients, None
            await server.stop()

    async def stop(self) -> None:
        await self.down()
        if self._for_containers is not None:
            await self._for_containers.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def url_for_containers(self) -> str:
        assert self._for_containers is not None
        return f"http://127.0.0.1:{_port(self._for_containers)}"


def _port(server: Server) -> int:
    return int(cast("Any", server._server).sockets[0].getsockname()[1])
