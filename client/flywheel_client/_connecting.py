"""Makes the clients of the subcommands of `flywheel` from the options of `Server`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from flywheel_client._client_sync import Client
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
