"""Assembles the server and runs it: listener, service, health, reflection, start and stop."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import grpc.aio
from flywheel_proto.v1 import generation_pb2_grpc
from grpc_health.v1 import health, health_pb2_grpc

from flywheel_server.engines.base import Engine
from flywheel_server.health import SERVICE, Health
from flywheel_server.interceptors.authentication import AuthenticationInterceptor
from flywheel_server.interceptors.errors import ErrorInterceptor
from flywheel_server.interceptors.request_id import RequestIdInterceptor
from flywheel_server.reflection import add_reflection
from flywheel_server.service import GenerationService
from flywheel_server.settings import Settings

LAST_WORDS: Final = 0.5
"""Seconds between the end of the last generation and that of the connections."""


@asynccontextmanager
async def serve(engine: Engine, settings: Settings) -> AsyncIterator[int]:
    """Serves the engine for the length of the context, which gets the port that the server listens on.

    It listens before the engine has started, so that a probe learns that it is not serving yet, and serves once the engine has
    produced a token. On leaving, running calls have `settings.drain_timeout` to finish; cancelling that ends them at once.

    Raises `OSError` where it cannot listen, and `EngineError` where the engine does not start.
    """
    service = GenerationService(engine, max_text_bytes=settings.max_text_bytes, max_num_samples=settings.max_num_samples)
    reported = Health()
    server = grpc.aio.server(interceptors=_interceptors(settings), options=_channel_arguments(settings))
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(service, server)
    health_pb2_grpc.add_HealthServicer_to_server(reported.servicer, server)
    add_reflection((SERVICE, health.SERVICE_NAME), server)
    await reported.report(serving=False, runners=False)
    try:
        port = server.add_insecure_port(settings.address)
    except RuntimeError as error:
        raise OSError(f"cannot listen on {settings.address}: is the address right, and free?") from error
    try:
        await server.start()
        async with engine:
            await engine.check()
            service.open()
            try:
                async with reported.following(engine, settings.health_interval):
                    yield port
            finally:
                await service.close(settings.drain_timeout)
    finally:
        # Time for the last messages and statuses to be sent. Streams that never end, such as those of health, are cut.
        await server.stop(LAST_WORDS)


def _interceptors(settings: Settings) -> list[grpc.aio.ServerInterceptor]:
    interceptors: list[grpc.aio.ServerInterceptor] = [RequestIdInterceptor(), ErrorInterceptor()]
    if settings.api_keys:
        interceptors.append(AuthenticationInterceptor(key.get_secret_value() for key in settings.api_keys))
    return interceptors


def _channel_arguments(settings: Settings) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_send_message_length", -1),
        # A long generation is silent between its messages, so clients ping to keep it alive through proxies: let them.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.keepalive_time_ms", round(settings.keepalive_time * 1000)),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", round(settings.min_ping_interval * 1000)),
        # With it, a second server on the same port starts without an error and takes half of the calls.
        ("grpc.so_reuseport", 0),
    ]
