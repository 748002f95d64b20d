"""Connects a gateway to the Internet through a tunnel: publishes its address, probes it from outside, and replaces it."""

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
"""Tunnels that a container opens, one after another. If the last does not answer either, the tunnels are not the cause."""

MAX_FAILED_PROBES: Final = 3
"""Failed probes in a row after which a tunnel counts as dead."""

RETRY_INTERVAL: Final = 5.0
"""Seconds between a failed probe and the next probe, or the normal interval if that is shorter."""

PROBE_TIMEOUT: Final = 10.0
"""Seconds that the server has to answer a probe."""

OPEN_TIMEOUT: Final = 30.0
"""Seconds for Modal to open a tunnel."""

CLOSE_TIMEOUT: Final = 1.0
"""Seconds to tell Modal to close the tunnels."""


@asynccontextmanager
async def published_tunnel(
    app: str, server: str, interval: float, on_lost: Callable[[], None]
) -> AsyncIterator[Callable[[], None]]:
    """Opens a tunnel to the server, and publishes its address for the length of the context.

    Gives a function that starts to withdraw the address, and returns at once. The tunnel stays open until the context ends,
    because running calls need it. A tunnel that stops answering is replaced; it stays open too, for its running calls.

    Arguments:
        app: The app for which to publish the address.
        server: HOST:PORT of the server within the container.
        interval: Seconds between two probes of the tunnel from outside. 0: no probes.
        on_lost: Called if the tunnel does not answer and cannot be replaced.

    Raises:
        modal.exception.Error: Modal does not open the tunnel, or does not store the address.
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
        on_lost()

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
        # Modal closes the tunnels with the container anyway.
        with suppress(modal.exception.Error, OSError):
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await modal_result(tunnels.aclose())


async def _keep_reachable(
    tunnels: AsyncExitStack, app: str, server: str, interval: float, reached: "asyncio.Future[None]"
) -> None:
    """Publishes one tunnel after another, and returns when the last one is dead. Cancelling it withdraws the address."""
    probe = TunnelProbe(server, interval)
    port = _host_and_port(server)[1]
    for _ in range(MAX_TUNNELS):
        async with asyncio.timeout(OPEN_TIMEOUT):
            forwarded = await modal_result(tunnels.enter_async_context(modal.forward(port, h2_enabled=True)))
        address = f"{forwarded.host}:{forwarded.port}"
        async with published(app, address):
            log.info("reachable", address=address)
            if not reached.done():
                reached.set_result(None)
            await probe.until_dead(address)
        log.warning("the tunnel does not answer", address=address)
        # Modal forwards a port only once, and the old tunnel stays open.
        port = await _open_relay(server)


async def _open_relay(server: str) -> int:
    """Opens another port that forwards to the server, and returns it."""
    host, port = _host_and_port(server)

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer), suppress(OSError):
            onward_reader, onward_writer = await asyncio.open_connection(host, port)
            with closing(onward_writer):
                await asyncio.gather(_copy(reader, onward_writer), _copy(onward_reader, writer))

    listener = await asyncio.start_server(relay, host, 0)
    return int(listener.sockets[0].getsockname()[1])


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copies bytes until the end of the stream."""
    with closing(writer):
        while data := await reader.read(2**16):
            writer.write(data)
            await writer.drain()


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


class TunnelProbe:
    """Probes tunnels from outside, as a caller does: with DNS, TLS, gRPC, and a health check of the server.

    Arguments:
        server: HOST:PORT of the server within the container.
        interval: Seconds between two probes. 0: no probes.
    """

    def __init__(self, server: str, interval: float) -> None:
        self._server = server
        self._interval = interval
        self._has_succeeded = False
        """Whether any probe has succeeded: the network may keep a container from reaching its own tunnel."""

    async def until_dead(self, address: str) -> None:
        """Returns when the tunnel has stopped answering although the server still answers locally."""
        failures = 0
        while self._interval:
            if await _answers(_tunnel_channel(address)):
                failures, self._has_succeeded = 0, True
            elif await _answers(grpc.aio.insecure_channel(self._server, _LOCAL_OPTIONS)):
                failures += 1
            if failures == MAX_FAILED_PROBES and self._has_succeeded:
                return
            if failures == MAX_FAILED_PROBES:
                log.warning("the tunnel cannot be looked at from its own container", address=address)
                failures = 0
            # At random, so that gateways that started together do not probe together.
            jitter = random.uniform(0.8, 1.2)  # noqa: S311 - nothing secret
            await asyncio.sleep(min(RETRY_INTERVAL, self._interval) if failures else self._interval * jitter)
        await asyncio.Event().wait()


_NEW_CONNECTION: Final = [("grpc.use_local_subchannel_pool", 1)]
"""Gives a channel a new connection: a connection that gRPC keeps from an earlier probe would prove nothing."""

_LOCAL_OPTIONS: Final = [*_NEW_CONNECTION, ("grpc.enable_http_proxy", 0)]
"""The proxy of the environment (`http_proxy`) is only for addresses outside the container."""


def _tunnel_channel(address: str) -> grpc.aio.Channel:
    return grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(), _NEW_CONNECTION)


async def _answers(channel: grpc.aio.Channel) -> bool:
    """Returns whether the server at the other end answers, whatever its health. Closes the channel."""
    async with channel:
        try:
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=PROBE_TIMEOUT)
        except grpc.aio.AioRpcError as error:
            # A server that is too busy still answers.
            return error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    return True
