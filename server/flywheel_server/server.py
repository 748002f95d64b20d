"""Assembles the server from its parts, starts it and drains it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc.aio
from flywheel_proto._service_name import SERVICE_NAME
from flywheel_proto.v1 import generation_pb2_grpc
from grpc_health.v1 import health, health_pb2_grpc

from flywheel_server import running_time
from flywheel_server.access.keys import KeyRing
from flywheel_server.admission import Admission
from flywheel_server.admission_control import LocalAdmissionControl
from flywheel_server.delivery import ReaderPolicy
from flywheel_server.engines.base import Engine, EngineUnavailableError
from flywheel_server.engines.uninterrupted import wait_until_done
from flywheel_server.errors import IncompleteRequestError
from flywheel_server.generations import Generations
from flywheel_server.health import Health
from flywheel_server.interceptors import methods
from flywheel_server.interceptors.authentication import Authentication
from flywheel_server.interceptors.calls import CallInterceptor
from flywheel_server.interceptors.public import PublicMethods
from flywheel_server.listening import channel_arguments, connections_allowed, listen, safe_credentials
from flywheel_server.operations import OperationWaiter
from flywheel_server.reflection import add_reflection
from flywheel_server.reporting import Reporting
from flywheel_server.service import GenerationService
from flywheel_server.settings import Settings
from flywheel_server.stopping import Connections
from flywheel_server.supervision import Supervisor
from flywheel_server.unregistered import Unregistered

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from flywheel_server.gauges import ServerGauges
    from flywheel_server.workers.link import Link


@asynccontextmanager
async def serve(engine: Engine, settings: Settings, link: "Link | None" = None) -> AsyncIterator[int]:
    """Serves the engine for the length of the context, which gets the port that the server listens on.

    The context is entered once the engine has produced a token. A server that is one process listens before that, so that a
    probe learns that it is not serving yet.

    On leaving, health says NOT_SERVING at once, and calls are still taken for `settings.withdraw_window` seconds. Then the port
    is closed, clients are asked to leave, and calls under way have `settings.drain_timeout` seconds to finish. Cancelling the
    drain ends them at once.

    Arguments:
        engine: The engine, not yet started.
        settings: The settings.
        link: What this process shares with other workers on the same port; by default the server is one process.

    Raises:
        OSError: The server cannot listen, or a file of the settings cannot be read.
        ValueError: The settings do not fit together, or a file does not hold what it should.
        EngineError: The engine does not start.
        EngineDiedError: The engine died later. This cancels the context.
    """
    async with _Server(engine, settings, link).running() as port:
        yield port


class _Server:
    """A server of one process: its parts, how they start, and how they stop. `serve` has the arguments and the errors."""

    def __init__(self, engine: Engine, settings: Settings, link: "Link | None") -> None:
        self._engine = engine
        self._settings = settings
        self._link = link
        self._keys = KeyRing((key.get_secret_value() for key in settings.api_keys), settings.api_keys_file)
        self._port = 0
        admission = link.admission if link else LocalAdmissionControl(Admission(settings.max_concurrent, settings.max_queued))
        self._admission = admission.queue if isinstance(admission, LocalAdmissionControl) else None
        """The admission of this process; None in a worker, whose parent has it."""
        self._generations = Generations(engine, admission)
        self._health = link.health if link else Health()
        self._reporting = Reporting(settings, link)
        self._requests = OperationWaiter(methods.REQUEST_TIMEOUT, IncompleteRequestError)
        asks_for_certificates = settings.tls_client_ca is not None
        self._authentication = Authentication(self._keys, certificates=asks_for_certificates)
        self._credentials = safe_credentials(settings, authenticates=self._keys.is_required or asks_for_certificates)
        self._grpc_server = self._create_grpc_server()
        self._add_servicers()
        self._connections = Connections(self._grpc_server)
        self._supervisor = Supervisor(
            engine,
            self._generations.activity,
            self._taking_calls,
            timeout=settings.engine_timeout,
            restarts=settings.engine_death == "restart",
        )

    def _create_grpc_server(self) -> grpc.aio.Server:
        settings = self._settings
        max_connections = connections_allowed(settings)
        calls = CallInterceptor(
            settings.max_header_bytes,
            settings.max_message_bytes,
            self._authentication,
            self._requests,
            PublicMethods(max_connections, self._requests),
            calls=self._reporting.calls,
        )
        arguments = channel_arguments(settings, max_connections, shares_port=self._link is not None)
        return grpc.aio.server(interceptors=[calls], options=arguments)

    def _add_servicers(self) -> None:
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(self._generation_service(), self._grpc_server)
        # The generated types insist on a whole server.
        seldom_called: Any = Unregistered(self._grpc_server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health.servicer, seldom_called)
        services = [SERVICE_NAME, health.SERVICE_NAME]
        if self._settings.channelz:
            from flywheel_server import channelz

            channelz.add_channelz(seldom_called)
            services.append(channelz.SERVICE_NAME)
        if self._settings.reflection:
            add_reflection(services, seldom_called)

    def _generation_service(self) -> GenerationService:
        settings, generations = self._settings, self._generations
        return GenerationService(
            generations,
            ReaderPolicy(settings.max_stream_bytes, settings.slow_reader, settings.slow_reader_timeout),
            get_counts=self._link.counting(generations, in_process=settings.engine_is_in_process)
            if self._link
            else generations.counts,
            max_text_bytes=settings.max_text_bytes,
            max_num_samples=settings.max_num_samples,
            log_prompts=settings.log_prompts,
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[int]:
        """Starts the server, gives its port for the length of the context, and drains the server."""
        # Reports are made for longer than calls run: from before the engine starts until all calls have ended.
        async with self._reporting.running(self._gauges_in), self._until_drained() as port:
            yield port

    def _gauges_in(self, registry: "CollectorRegistry") -> "ServerGauges":
        """Adds the figures of this server to a registry, and returns them."""
        from flywheel_server.gauges import ServerGauges
        from flywheel_server.telemetry.expiry import Expiry

        return ServerGauges(
            registry,
            self._reporting.calls,
            self._generations,
            self._supervisor,
            admission=self._admission,
            get_port=lambda: self._port,
            expiry=Expiry(self._keys.next_to_expire, self._settings.tls_cert, self._settings.tls_client_ca),
        )

    @asynccontextmanager
    async def _until_drained(self) -> AsyncIterator[int]:
        try:
            # A worker listens only when it serves: until then, connections go to workers that do.
            port = 0 if self._link else await self._listen()
            async with self._supervisor.running(), self._keys.following(self._generations.revoke):
                try:
                    yield port or await self._listen()
                finally:
                    await self._drain()
        finally:
            await self._connections.end()

    async def _listen(self) -> int:
        """Opens the port and returns it."""
        self._port = listen(self._grpc_server, self._settings.address, self._credentials)
        # A start that is cancelled breaks within gRPC.
        await wait_until_done(asyncio.create_task(self._grpc_server.start()))
        return self._port

    @asynccontextmanager
    async def _taking_calls(self) -> AsyncIterator[None]:
        """Takes calls and reports the engine's health for the length of the context, in which the engine runs."""
        self._generations.open()
        try:
            async with self._health.probing(self._engine, self._settings.health_interval):
                yield
        finally:
            self._generations.interrupt()

    async def _drain(self) -> None:
        """Sends callers elsewhere, and returns when all generations have ended; see `serve`."""
        self._health.withdraw()
        drain_timeout = 0.0
        try:
            if self._generations.is_open:
                await running_time.sleep(self._settings.withdraw_window)
            drain_timeout = self._settings.drain_timeout
        finally:
            self._connections.drain()
            self._health.end()
            # Their clients may never send the rest of these requests.
            self._requests.end(lambda: EngineUnavailableError("the server is stopping"))
            await self._generations.close(drain_timeout)
