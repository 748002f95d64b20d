"""Where the server listens, for whom, and what each connection may have."""

import ipaddress
from typing import Final

import grpc.aio
import structlog

from flywheel_server.certificates import server_credentials
from flywheel_server.settings import Settings
from flywheel_server.system import descriptors

log = structlog.stdlib.get_logger(__name__)

HANDSHAKE_TIMEOUT: Final = 20.0
"""Seconds that a new connection has for the handshakes of TLS and HTTP/2."""

MAX_UNSEEN_CALLS: Final = 16_384
"""Calls that have arrived and that the server has not looked at yet; gRPC cancels further ones.

Each takes 16 KiB, and it stays when its connection is closed: without this limit, one peer could use up the memory.
"""

RESERVED_DESCRIPTORS: Final = 64
"""Descriptors that connections leave to the engine, files that are read again, and connections that are about to be refused."""

MIN_CONNECTIONS: Final = 8
"""Connections without which a server does not start, unless the settings want fewer: some clients, a proxy, a health check."""

SAFE_GRPC: Final = (1, 84)
"""The first version of grpcio that receives no more of a message than the limit, however long its sender says that it is."""


class UnsafeError(ValueError):
    """The settings would let in callers whom nobody has thought of."""


def safe_credentials(settings: Settings, *, authenticates: bool) -> grpc.ServerCredentials | None:
    """Returns the credentials to listen with; None without TLS. Warns of what is at risk.

    Raises:
        OSError: A file of TLS cannot be read.
        ValueError: The settings do not fit together, or the files of TLS do not hold what they should.
        UnsafeError: Anybody on a network could call, and the settings do not say that this is meant.
    """
    credentials = _credentials(settings)
    if not _is_loopback(settings.address):
        if not authenticates and not settings.allow_unauthenticated_network_callers:
            raise UnsafeError(
                f"anybody who reaches {settings.address} could call. Ask for keys (--api-keys-file or FLYWHEEL_API_KEYS) or "
                "certificates (--tls-client-ca), listen on 127.0.0.1, or say --allow-unauthenticated-network-callers true"
            )
        if credentials is None:
            log.warning("no TLS: prompts and keys cross the network in the clear, unless something before the server ends TLS")
        if _grpc_version() < SAFE_GRPC:
            log.warning(
                f"grpcio {grpc.__version__} keeps requests of any length that never end, also of callers without a key: "
                "install 1.84 or newer"
            )
    return credentials


def listen(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None) -> int:
    """Makes the server listen, and returns its port; raises `OSError` if it cannot listen there."""
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


def _grpc_version() -> tuple[int, ...]:
    return tuple(map(int, grpc.__version__.split(".")[:2]))


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def connections_allowed(settings: Settings) -> int:
    """Return `max_connections`, or as many as the limit of open files leaves room for.

    To be called before the engine starts: what it needs is within the reserve.

    Raises:
        OSError: There is hardly room for any.
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
    """Returns what gRPC itself is to hold so many connections to.

    Arguments:
        settings: The settings.
        connections: The most connections at a time.
        shares_port: Whether other processes of this server listen on the same port.
    """
    age = [
        ("grpc.max_connection_age_ms", _milliseconds(settings.max_connection_age)),
        ("grpc.max_connection_age_grace_ms", _milliseconds(settings.max_connection_age_grace)),
    ]
    return [
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        # The server does that itself, within a bound, once the caller is known: see `flywheel_server.compression`.
        ("grpc.per_message_decompression", 0),
        # With it, gRPC takes 4 MiB of a message that nobody has asked for yet; without it 64 KiB, and the rest when it is read.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.max_send_message_length", -1),
        # Between the two, gRPC refuses at random; the same for both is one limit.
        ("grpc.max_metadata_size", settings.max_header_bytes),
        ("grpc.absolute_max_metadata_size", settings.max_header_bytes),
        ("grpc.max_concurrent_streams", settings.max_streams),
        # With it, a call counts until gRPC has freed its memory, which its client cannot know: a client that keeps to the limit
        # is refused with REFUSED_STREAM as soon as the server is busy.
        ("grpc.http.overload_protection", 0),
        ("grpc.max_allowed_incoming_connections", connections),
        # Between the two, gRPC cancels calls at random, and beyond, all. With its defaults of 1000 and 3000 it would do what is
        # admission's to do.
        ("grpc.server.max_pending_requests", MAX_UNSEEN_CALLS),
        ("grpc.server.max_pending_requests_hard_limit", MAX_UNSEEN_CALLS),
        ("grpc.server_handshake_timeout_ms", _milliseconds(HANDSHAKE_TIMEOUT)),
        *(age if settings.max_connection_age else ()),
        # A long generation is silent between its messages, so clients ping to keep it alive through proxies: let them.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.keepalive_time_ms", _milliseconds(settings.keepalive_time)),
        # The latter is 60 s by default, and the longer of the two counts.
        ("grpc.keepalive_timeout_ms", _milliseconds(settings.keepalive_timeout)),
        ("grpc.http2.ping_timeout_ms", _milliseconds(settings.keepalive_timeout)),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", _milliseconds(settings.min_ping_interval)),
        # With it, a second server on the same port starts without an error and takes half of the calls. Workers are to do so,
        # and `flywheel_server.workers.port` keeps others away from them.
        ("grpc.so_reuseport", int(shares_port)),
    ]


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)
