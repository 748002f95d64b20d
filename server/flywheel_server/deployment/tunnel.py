"""How a gateway is reached from the Internet: through a tunnel, which is published, looked at from outside, and replaced."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, closing, suppress
from typing import Final

import grpc
import grpc.aio
import modal
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc

from flywheel_server.deployment.directory import published
from flywheel_server.engines.modal.waits import modal_result

log = structlog.stdlib.get_logger(__name__)

MAX_TUNNELS: Final = 3
"""Tunnels that a container opens, one after another. If the last does not answer either, the fault is not the tunnel's."""

MAX_FAILURES: Final = 3
"""Looks in a row without an answer after which a tunnel counts as dead."""

RETRY_INTERVAL: Final = 5.0
"""Seconds between a look without an answer and the next look, or the interval of the looks if that is shorter."""

LOOK_TIMEOUT: Final = 10.0
"""Seconds that the server has to answer a look."""

OPEN_TIMEOUT: Final = 30.0
"""Seconds for Modal to open a tunnel."""

CLOSE_TIMEOUT: Final = 1.0
"""Seconds to tell Modal that tunnels are no longer needed."""


@asynccontextmanager
async def reachable(app: str, server: str, interval: float, lost: Callable[[], None]) -> AsyncIterator[Callable[[], None]]:
    """Opens a tunnel to the server, and publishes its address for the length of the context.

    The context gets a function that begins to withdraw the address and returns at once. The tunnel itself stays open until the
    context ends: the last calls need it. A tunnel that no longer answers is replaced, and stays open too, for the calls that
    still run through it.

    Arguments:
        app: The app under whose name to publish the address.
        server: HOST:PORT of the server within the container.
        interval: Seconds between two looks at the tunnel from outside. 0 for none.
        lost: Called if the tunnel does not answer and cannot be replaced.

    Raises:
        modal.exception.Error: Modal does not open the tunnel, or does not take the address.
        TimeoutError: Modal does not answer.
    """
    reached: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    tunnels = AsyncExitStack()
    keeping = asyncio.create_task(_keep_reachable(tunnels, app, server, interval, reached))

    def ended(_: object) -> None:
        if keeping.cancelled():
            return
        error = keeping.exception()
        if not reached.done() and error is not None:
            reached.set_exception(error)
            return
        log.error("the tunnel does not answer, and cannot be replaced", error=repr(error) if error else None)
        lost()

    def withdraw() -> None:
        if not keeping.cancelling():  # a second time would cut the withdrawal short
            keeping.cancel()

    keeping.add_done_callback(ended)
    try:
        await reached
        yield withdraw
    finally:
        withdraw()
        await asyncio.wait({keeping})
        # They end with the container anyway.
        with suppress(modal.exception.Error, OSError):
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await modal_result(tunnels.aclose())


async def _keep_reachable(
    tunnels: AsyncExitStack, app: str, server: str, interval: float, reached: "asyncio.Future[None]"
) -> None:
    """Publishes one tunnel after another; returns when the last one does not answer. Cancelling it withdraws the address."""
    looks = Looks(server, interval)
    port = _host_and_port(server)[1]
    for _ in range(MAX_TUNNELS):
        async with asyncio.timeout(OPEN_TIMEOUT):
            forwarded = await modal_result(tunnels.enter_async_context(modal.forward(port, h2_enabled=True)))
        address = f"{forwarded.host}:{forwarded.port}"
        async with published(app, address):
            log.info("reachable", address=address)
            if not reached.done():
                reached.set_result(None)
            await looks.until_dead(address)
        log.warning("the tunnel does not answer", address=address)
        # Modal forwards a port only once, and the old tunnel stays open.
        port = await _another_port(server)


async def _another_port(server: str) -> int:
    """Listens on a further port, which leads to that of the server, and returns it."""
    host, port = _host_and_port(server)

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer), suppress(OSError):
            onward_reader, onward_writer = await asyncio.open_connection(host, port)
            with closing(onward_writer):
                await asyncio.gather(_pump(reader, onward_writer), _pump(onward_reader, writer))

    listener = await asyncio.start_server(relay, host, 0)
    return int(listener.sockets[0].getsockname()[1])


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Passes on what is read until there is no more."""
    with closing(writer):
        while data := await reader.read(2**16):
            writer.write(data)
            await writer.drain()


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


class Looks:
    """Looks at tunnels from outside now and then, as a caller does: DNS, TLS, gRPC, and an answer of the server.

    Arguments:
        server: HOST:PORT of the server within the container.
        interval: Seconds between two looks. 0 for none.
    """

    def __init__(self, server: str, interval: float) -> None:
        self._server = server
        self._interval = interval
        self._can_see = False
        """Whether a look has ever had an answer: a network may keep a container from reaching its own tunnel."""

    async def until_dead(self, address: str) -> None:
        """Returns when the address does not answer although the server does."""
        failures = 0
        while self._interval:
            if await _answers(_outside(address)):
                failures, self._can_see = 0, True
            elif await _answers(grpc.aio.insecure_channel(self._server, _WITHIN)):
                failures += 1
            if failures == MAX_FAILURES and self._can_see:
                return
            if failures == MAX_FAILURES:
                log.warning("the tunnel cannot be looked at from its own container", address=address)
                failures = 0
            await asyncio.sleep(min(RETRY_INTERVAL, self._interval) if failures else self._interval * _spread())
        await asyncio.Event().wait()


def _spread() -> float:
    """Returns a factor that keeps gateways which were started together from looking together."""
    return random.uniform(0.8, 1.2)  # noqa: S311 - nothing secret


_OWN_CONNECTION: Final = [("grpc.use_local_subchannel_pool", 1)]
"""A channel of its own has a connection of its own: one that gRPC keeps from an earlier look would prove nothing."""

_WITHIN: Final = [*_OWN_CONNECTION, ("grpc.enable_http_proxy", 0)]
"""The proxy of the environment (`http_proxy`) is for what is outside of the container."""


def _outside(address: str) -> grpc.aio.Channel:
    return grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(), _OWN_CONNECTION)


async def _answers(channel: grpc.aio.Channel) -> bool:
    """Returns whether the server at the other end answers, whatever it says of its health. Closes the channel."""
    async with channel:
        try:
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=LOOK_TIMEOUT)
        except grpc.aio.AioRpcError as error:
            # A server that has too many calls is there.
            return error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    return True
