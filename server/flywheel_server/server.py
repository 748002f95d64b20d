"""Assembles the server and runs it: listener, service, health, reflection, start and stop."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc.aio
from flywheel_proto._service_name import SERVICE_NAME
from flywheel_proto.v1 import generation_pb2_grpc
from grpc_health.v1 import health, health_pb2_grpc

from flywheel_server import running_time
from flywheel_server.access.keys import KeyRing
from flywheel_server.admission import Admission
from flywheel_server.admission_control import LocalAdmissionControl
from flywheel_server.counts import local_counts
from flywheel_server.delivery import ReaderPolicy
from flywheel_server.engine_factory import runs_in_process
from flywheel_server.engines.base import Engine, EngineUnavailableError
from flywheel_server.engines.uninterrupted import to_its_end
from flywheel_server.errors import IncompleteRequestError
from flywheel_server.generations import Generations
from flywheel_server.health import Health
from flywheel_server.interceptors import reading
from flywheel_server.interceptors.authentication import Authentication
from flywheel_server.interceptors.calls import CallInterceptor
from flywheel_server.interceptors.public import PublicMethods
from flywheel_server.interceptors.reading import RequestReader
from flywheel_server.listening import channel_arguments, connections_allowed, listen, safe_credentials
from flywheel_server.operations import Waits
from flywheel_server.reflection import add_reflection
from flywheel_server.service import GenerationService
from flywheel_server.settings import Settings
from flywheel_server.stopping import Connections
from flywheel_server.supervision import Supervisor
from flywheel_server.unregistered import Unregistered

if TYPE_CHECKING:
    from flywheel_server.workers.link import Link


@asynccontextmanager
async def serve(engine: Engine, settings: Settings, link: "Link | None" = None) -> AsyncIterator[int]:
    """Serves the engine for the length of the context, which gets the port that the server listens on.

    It serves once the engine has produced a token. If it serves alone, it listens before that, so that a probe learns that it
    is not serving yet. On leaving, it takes calls for `settings.withdraw_window` more although health says otherwise. Then it
    closes the port, asks clients to leave, and gives calls under way `settings.drain_timeout` to finish. Cancelling that ends
    them at once.

    Arguments:
        engine: The engine, not yet started.
        settings: The settings.
        link: What this process shares with others that serve on the same port; by default it serves alone.

    Raises:
        OSError: It cannot listen, or a file of the settings cannot be read.
        ValueError: The settings do not fit together, or a file does not hold what it should.
        EngineError: The engine does not start.
        EngineDiedError: The engine died later. This cancels the context.
    """
    keys = KeyRing((key.get_secret_value() for key in settings.api_keys), settings.api_keys_file)
    admission = (
        link.admission
        if link
        else LocalAdmissionControl(Admission(settings.max_concurrent, settings.max_queued, running_time.clock().time))
    )
    generations = Generations(engine, admission)
    own_count = partial(local_counts, engine, generations)
    service = GenerationService(
        generations,
        ReaderPolicy(settings.max_stream_bytes, settings.slow_reader, settings.slow_reader_timeout),
        count=link.counting(engine, generations, in_process=runs_in_process(settings)) if link else own_count,
        max_text_bytes=settings.max_text_bytes,
        max_num_samples=settings.max_num_samples,
        log_prompts=settings.log_prompts,
    )
    reported = link.health if link else Health()
    requests = Waits(reading.REQUEST_TIMEOUT, IncompleteRequestError)
    authentication = Authentication(keys, certificates=settings.tls_client_ca is not None)
    credentials = safe_credentials(settings, authenticates=keys.is_required or settings.tls_client_ca is not None)
    max_connections = connections_allowed(settings)
    server = grpc.aio.server(
        interceptors=[
            CallInterceptor(
                settings.max_header_bytes,
                authentication,
                RequestReader(settings.max_message_bytes, requests, authentication),
                PublicMethods(max_connections, requests),
            )
        ],
        options=channel_arguments(settings, max_connections, shares_port=link is not None),
    )
    connections = Connections(server)
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(service, server)
    # As if it were a server, which the generated types insist on.
    seldom_called: Any = Unregistered(server)
    health_pb2_grpc.add_HealthServicer_to_server(reported.servicer, seldom_called)
    if settings.reflection:
        add_reflection((SERVICE_NAME, health.SERVICE_NAME), seldom_called)
    supervisor = Supervisor(
        engine,
        generations.activity,
        lambda: _open(generations, reported, engine, settings.health_interval),
        timeout=settings.engine_timeout,
        restarts=settings.engine_death == "restart",
    )

    async def start() -> int:
        port = listen(server, settings.address, credentials)
        # One that is stopped while it starts breaks within gRPC.
        await to_its_end(asyncio.create_task(server.start()))
        return port

    try:
        port = 0 if link else await start()
        async with supervisor.running(), keys.following(generations.revoke):
            try:
                # One of several gets no connections before: another one may serve them.
                yield port or await start()
            finally:
                reported.withdraw()
                drain_timeout = 0.0
                try:
                    if generations.is_open:
                        await running_time.sleep(settings.withdraw_window)
                    drain_timeout = settings.drain_timeout
                finally:
                    connections.drain()
                    reported.end()
                    # A drain would wait in vain for requests that do not come.
                    requests.end(lambda: EngineUnavailableError("the server is stopping"))
                    await generations.close(drain_timeout)
    finally:
        await connections.end()


@asynccontextmanager
async def _open(generations: Generations, reported: Health, engine: Engine, health_interval: float) -> AsyncIterator[None]:
    """Takes calls and reports how the engine is, for the length of the context."""
    generations.open()
    try:
        async with reported.following(engine, health_interval):
            yield
    finally:
        generations.interrupt()
