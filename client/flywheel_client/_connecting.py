"""Makes the clients of the subcommands of `flywheel` from the options of `Server`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from flywheel_client._channel import Connection, call_metadata
from flywheel_client._client_sync import Client
from flywheel_client._modal import ModalDirectory
from flywheel_client._retry import Retry

if TYPE_CHECKING:
    from flywheel_client._options import Server


def client_of(server: "Server", timeout: float | None, retry: Retry | None = None) -> Client:
    """Returns a client of the server, without retries by default."""
    arguments: dict[str, Any] = {
        "timeout": timeout,
        "credentials": _credentials(server),
        "api_key": server.api_key,
        "retry": retry,
        "wait_for_ready": server.wait_for_ready,
    }
    if server.modal_app is None:
        return Client(server.address, **arguments)
    return Client.from_modal(server.modal_app, environment=server.modal_environment, **arguments)


def connection_of(server: "Server", timeout: float, channel_options: Sequence[tuple[str, Any]]) -> Connection:
    """Returns the arguments of channels to the server, without retries."""
    if server.modal_app is None:
        target: str | ModalDirectory = server.address
    else:
        target = ModalDirectory(server.modal_app, server.modal_environment)
    metadata = call_metadata((), server.api_key)
    return Connection(target, timeout, metadata, channel_options, _credentials(server), None, server.wait_for_ready)


def _credentials(server: "Server") -> grpc.ChannelCredentials | None:
    if (server.cert is None) != (server.key is None):
        raise ValueError("--cert and --key need each other")
    trusted, chain, key = pem("--cacert", server.cacert), pem("--cert", server.cert), pem("--key", server.key)
    if server.modal_app or server.tls or trusted or chain:
        return grpc.ssl_channel_credentials(trusted, key, chain)
    return None


def pem(option: str, path: Path | None) -> bytes | None:
    """Returns the content of a PEM file. For other files, gRPC would only say that it could not connect."""
    if path is None:
        return None
    content = path.read_bytes()
    if b"-----BEGIN " not in content:
        raise ValueError(f"{option} must be a file in PEM, which {path} is not")
    return content
