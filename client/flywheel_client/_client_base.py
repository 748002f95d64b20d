"""The base of `Client` and `AsyncClient`: their constructor and `from_modal`."""

from collections.abc import Sequence
from typing import Any, Self

import grpc

from flywheel_client._channel import Connection, call_metadata
from flywheel_client._modal import ModalDirectory
from flywheel_client._pool import Directory
from flywheel_client._records import DEFAULT_APP
from flywheel_client._retry import DEFAULT_RETRY, Retry


class BaseClient:
    """Holds the arguments of a client and its channels."""

    def __init__(
        self,
        address: str | Directory,
        *,
        timeout: float | None = None,
        metadata: Sequence[tuple[str, str | bytes]] = (),
        channel_options: Sequence[tuple[str, Any]] = (),
        credentials: grpc.ChannelCredentials | None = None,
        api_key: str | None = None,
        retry: Retry | None = DEFAULT_RETRY,
        wait_for_ready: bool = False,
    ) -> None:
        """Makes a client.

        Args:
            address: The server's `host:port`, or any other target of gRPC, such as `dns:///host:port` or
                `ipv4:10.0.0.1:50051,10.0.0.2:50051`. If a target has several servers, calls go in turn to all servers whose
                health is SERVING. (`from_modal` passes a directory of servers instead.) Calls to this machine ignore the proxy
                of the environment (`http_proxy`), unless `channel_options` set a proxy.
            timeout: The seconds that a call may take, unless the call sets its own timeout. More than 27,000 hours, the
                longest deadline that gRPC sends, means no deadline. Default: no deadline.
            metadata: Metadata that every call sends, such as `[("tenant", "a")]`. Keys are lowercase.
            channel_options: Options of the channel, which override the client's own options, such as
                `[("grpc.max_receive_message_length", 256 * 2**20)]` for answers of more than 64 MiB.
            credentials: Credentials for TLS, such as `grpc.ssl_channel_credentials()`. A private key and a certificate in
                the credentials make it mutual TLS. Default: plaintext.
            api_key: The key that the server requires. The client sends it as `authorization: Bearer KEY`.
            retry: How to retry a call that failed before the engine began on it; None never retries. Default: up to 5
                attempts.
            wait_for_ready: Whether a call waits, within its deadline, until a server can be reached and is SERVING. By
                default, the call fails if no server is ready after the retries.

        Raises:
            TypeError: The address is not a string, the timeout is not a number, or the metadata are not pairs of a `str` key
                and a `str` value (a `bytes` value if the key ends with `-bin`).
            ValueError: The address is not a target of gRPC; the timeout is negative or NaN; the API key is empty or has
                characters that are not visible ASCII; or gRPC does not allow the metadata (keys are lowercase ASCII and not
                reserved, values are printable ASCII).
        """
        self._connection = Connection(
            address, timeout, call_metadata(metadata, api_key), channel_options, credentials, retry, wait_for_ready
        )
        self._channels: dict[Any, Any] = {}
        self._closed = False

    @classmethod
    def from_modal(
        cls,
        app: str = DEFAULT_APP,
        *,
        environment: str | None = None,
        api_key: str | None = None,
        timeout: float | None = None,
        metadata: Sequence[tuple[str, str | bytes]] = (),
        channel_options: Sequence[tuple[str, Any]] = (),
        credentials: grpc.ChannelCredentials | None = None,
        retry: Retry | None = DEFAULT_RETRY,
        wait_for_ready: bool = False,
    ) -> Self:
        """Makes a client of a deployment on Modal. The client finds the deployment by name, and its containers as they change.

        Each call goes to the endpoint that has the fewest calls of this client. If the endpoint is gone or about to stop
        before the engine has begun on the call, the client tries another endpoint. The deadline and the maximum number of
        attempts cover all tries of a call together. Once the engine has begun, the client never repeats the call, and raises
        `UnavailableError`. The first call of the client asks Modal for the addresses, and waits for the answer.

        Args:
            app: The name of the deployed app.
            environment: The Modal environment of the app. Default: the environment of the Modal configuration.
            api_key: The key that the server requires. The client sends it as `authorization: Bearer KEY`.
            timeout: The seconds that a call may take, unless the call sets its own timeout. Default: no deadline.
            metadata: Metadata that every call sends. Keys are lowercase.
            channel_options: Options of the channels, which override the client's own options.
            credentials: Credentials for TLS. Default: `grpc.ssl_channel_credentials()`.
            retry: How to retry a call, on any endpoint, that failed before the engine began on it; None tries one endpoint
                once. Default: up to 5 attempts.
            wait_for_ready: Whether a call waits, within its deadline, while the deployment has no endpoint.

        Raises:
            ModuleNotFoundError: The package modal is not installed: `pip install 'flywheel-grpc[modal]'`.
            TypeError: As for the constructor.
            ValueError: As for the constructor.
        """
        return cls(
            ModalDirectory(app, environment),
            timeout=timeout,
            metadata=metadata,
            channel_options=channel_options,
            credentials=grpc.ssl_channel_credentials() if credentials is None else credentials,
            api_key=api_key,
            retry=retry,
            wait_for_ready=wait_for_ready,
        )
