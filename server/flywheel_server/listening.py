"""Configures how the server listens: TLS, who may connect, and the limits of connections."""

import ipaddress
from typing import Final

import grpc.aio
import structlog

from flywheel_server.certificates import server_credentials
from flywheel_server.settings import Settings
from flywheel_server.system import descriptors

log = structlog.stdlib.get_logger(__name__)

HANDSHAKE_TIMEOUT: Final = 20.0
"""Seconds that a new connection has for the TLS and HTTP/2 handshakes."""

MAX_PENDING_CALLS: Final = 16_384
"""Calls that have arrived and that the server has not started to handle. gRPC cancels further calls.

A pending call takes 16 KiB, even after its connection is closed: without this limit, one peer could use up the memory.
"""

RESERVED_DESCRIPTORS: Final = 64
"""Descriptors that are kept free of connections: for the engine, reloaded files, and connections that are being refused."""

MIN_CONNECTIONS: Final = 8
"""A server does not start with room for fewer connections, unless `max_connections` is less."""

MIN_SAFE_GRPC_VERSION: Final = (1, 84)
"""The first version of grpcio that stops receiving a message at the size limit, whatever length its sender declares."""


class UnsafeError(ValueError):
    """The settings would let anybody on the network call, without saying that this is intended."""


def safe_credentials(settings: Settings, *, authenticates: bool) -> grpc.ServerCredentials | None:
    """Returns the credentials to listen with; None without TLS. Logs a warning for each risk.

    Arguments:
        settings: The settings.
        authenticates: Whether callers need a key or a certificate.

    Raises:
        OSError: A TLS file cannot be read.
        ValueError: The TLS settings are incomplete, or a TLS file is invalid.
        UnsafeError: Anybody on a network could call, and the settings do not allow that.
    """
    credentials = _credentials(settings)
    if not is_loopback(settings.address):
        if not authenticates and not settings.allow_unauthenticated_network_callers:
            raise UnsafeError(
                f"anybody who reaches {settings.address} could call. Ask for keys (--api-keys-file or FLYWHEEL_API_KEYS) or "
                "certificates (--tls-client-ca), listen on 127.0.0.1, or set --allow-unauthenticated-network-callers true"
            )
        if credentials is None:
            log.warning(
                "no TLS: prompts and keys cross the network in the clear, unless a proxy in front of the server terminates TLS"
            )
        if tuple(map(int, grpc.__version__.split(".")[:2])) < MIN_SAFE_GRPC_VERSION:
            log.warning(
                f"grpcio {grpc.__version__} buffers unfinished requests of any length, even from callers without a key: "
                "install 1.84 or newer"
            )
    return credentials


def listen(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None) -> int:
    """Makes the server listen on the address, and returns the port. Raises `OSError` if it cannot."""
    try:
        if credentials is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, credentials)
    except RuntimeError as error:
        certificate = ", and is the certificate of a kind that gRPC takes (RSA, ECDSA P-256)" if credentials else ""
        raise OSError(f"cannot listen on {address}: is the address right, and free{certificate}?") from error


def _credentials(settings: Settings) -> grpc.ServerCredentials | None:
    if settings.tls_cert is not None and settings.tls_key is not None:
        return server_credentials(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
    if any(file is not None for file in (settings.tls_cert, settings.tls_key, settings.tls_client_ca)):
        raise ValueError("TLS needs both --tls-cert and --tls-key")
    return None


def is_loopback(address: str) -> bool:
    """Returns whether only this machine can reach the address, which is HOST:PORT."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def connections_allowed(settings: Settings) -> int:
    """Returns `max_connections`, or fewer if the limit of open files requires it.

    To be called before the engine starts, because `RESERVED_DESCRIPTORS` includes the engine's descriptors.

    Raises:
        OSError: The limit leaves fewer than `MIN_CONNECTIONS`.
    """
    wanted = settings.max_connections
    fewest = min(wanted, MIN_CONNECTIONS)
    taken = descriptors.in_use() + RESERVED_DESCRIPTORS
    limit = descriptors.limit()
    allowed = min(wanted, limit - taken)
    if allowed < fewest:
        raise OSError(
            f"the limit of open files, {limit}, leaves no room for connections: raise it (ulimit -n) to {wanted + taken}, "
            f"or at least to {fewest + taken}"
        )
    if allowed < wanted:
        log.warning(
            f"max_connections is cut from {wanted} to {allowed}, as the limit of open files is {limit}: raise it (ulimit -n) "
            f"to {wanted + taken}, or lower max_connections"
        )
    return allowed


def channel_arguments(settings: Settings, connections: int, *, shares_port: bool) -> list[tuple[str, int]]:
    """Returns the channel arguments of the gRPC server.

    Arguments:
        settings: The settings.
        connections: The maximum number of connections at a time.
        shares_port: Whether other processes of this server listen on the same port.
    """
    age = [
        ("grpc.max_connection_age_ms", _milliseconds(settings.max_connection_age)),
        ("grpc.max_connection_age_grace_ms", _milliseconds(settings.max_connection_age_grace)),
    ]
    return [
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        # The server decompresses by itself, after authentication and up to a limit: see `flywheel_server.compression`.
        ("grpc.per_message_decompression", 0),
        # With it, gRPC receives up to 4 MiB of a message before it is read; without it, 64 KiB.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.max_send_message_length", -1),
        # Between the two limits, gRPC refuses calls at random. Equal values make it one limit.
        ("grpc.max_metadata_size", settings.max_header_bytes),
        ("grpc.absolute_max_metadata_size", settings.max_header_bytes),
        ("grpc.max_concurrent_streams", settings.max_streams),
        # With it, a call counts until gRPC has freed its memory, which its client cannot know. A busy server
        # would refuse clients with REFUSED_STREAM although they keep to the limit.
        ("grpc.http.overload_protection", 0),
        ("grpc.max_allowed_incoming_connections", connections),
        # Between the two limits, gRPC cancels calls at random; above, all calls. With the defaults of 1000 and 3000, it would
        # cancel calls that admission should queue or refuse.
        ("grpc.server.max_pending_requests", MAX_PENDING_CALLS),
        ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING_CALLS),
        ("grpc.server_handshake_timeout_ms", _milliseconds(HANDSHAKE_TIMEOUT)),
        *(age if settings.max_connection_age else ()),
        # Clients may ping, to keep connections alive through proxies: a long generation sends nothing between its messages.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.keepalive_time_ms", _milliseconds(settings.keepalive_time)),
        # The longer of the two timeouts counts, and `ping_timeout_ms` is 60 s by default.
        ("grpc.keepalive_timeout_ms", _milliseconds(settings.keepalive_timeout)),
        ("grpc.http2.ping_timeout_ms", _milliseconds(settings.keepalive_timeout)),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", _milliseconds(settings.min_ping_interval)),
        # With it, a second server can listen on the same port, and gets half of the calls. That is for workers only, and
        # `flywheel_server.workers.port` keeps other servers away from their port.
        ("grpc.so_reuseport", int(shares_port)),
        *((("grpc.enable_channelz", 1),) if settings.channelz else ()),
    ]


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)
