"""What both clients have in common: their construction."""

from collections.abc import Sequence
from typing import Any, Self

import grpc

from flywheel_client._channel import Connection, call_metadata
from flywheel_client._modal import ModalDirectory
from flywheel_client._pool import Directory
from flywheel_client._records import DEFAULT_APP
from flywheel_client._retry import DEFAULT_RETRY, Retry


class BaseClient:
    """The construction of `Client` and `AsyncClient`."""

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
                `ipv4:10.0.0.1:50051,10.0.0.2:50051`: calls go in turn to all of its servers that are SERVING by their health.
                (`from_modal` gives a directory of them.) Those of this machine are called without the proxy of the environment
                (`http_proxy`), unless `channel_options` say otherwise.
            timeout: The seconds that a call may take unless it says otherwise; above 27,000 hours, the most that gRPC sends, no
                deadline. Default: no deadline.
            metadata: What every call carries, such as `[("tenant", "a")]`. Keys are lowercase.
            channel_options: Options of the channel, which take precedence over the client's own, such as
                `[("grpc.max_receive_message_length", 256 * 2**20)]` for answers of more than 64 MiB.
            credentials: For TLS, such as `grpc.ssl_channel_credentials()`; with a key and a certificate it is mutual TLS.
            api_key: The key that the server asks for; sent as `authorization: Bearer KEY`.
            retry: How a call is tried again that failed before the engine began on it; with None a call is tried once.
                Default: up to 5 attempts.
            wait_for_ready: Whether a call waits, within its deadline, for a server that can be reached and is SERVING. By
                default it fails, once it was tried again, where there is none.

        Raises:
            TypeError: The address is no string, the timeout is no number, or the metadata are no pairs of `str` and `str`, or
                `bytes` if the key ends with `-bin`.
            ValueError: The address is no target of gRPC; the timeout is negative or NaN; the API key is empty, or has other
                characters than visible ASCII; or gRPC does not allow the metadata: keys are lowercase ASCII and not reserved,
                values are printable ASCII.
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
        """Makes a client of a deployment on Modal, which it finds by name and follows as containers come and go.

        Each call goes to the endpoint with the fewest calls of this client. A call that finds its endpoint gone, or about to
        stop, before the engine has begun on it is tried on another; one deadline and one number of attempts hold for all
        tries. After that it is never repeated: it raises `UnavailableError`. The client's first call asks Modal for the
        addresses, and waits for them.

        Args:
            app: The name of the deployed app.
            environment: The Modal environment it is deployed in. Default: that of the Modal configuration.
            api_key: The key that the server asks for; sent as `authorization: Bearer KEY`.
            timeout: The seconds that a call may take unless it says otherwise. Default: no deadline.
            metadata: What every call carries. Keys are lowercase.
            channel_options: Options of the channels, which take precedence over the client's own.
            credentials: Default: `grpc.ssl_channel_credentials()`.
            retry: How a call is tried again, on any endpoint, that failed before the engine began on it; with None a call is
                tried once, on one endpoint. Default: up to 5 attempts.
            wait_for_ready: Whether a call waits, within its deadline, for as long as there is no endpoint.

        Raises:
            ModuleNotFoundError: The package modal is not installed: `pip install 'flywheel-grpc[modal]'`.
            TypeError: The metadata are no pairs of `str` and `str`, or `bytes` if the key ends with `-bin`.
            ValueError: The API key is empty, or has characters that are not visible ASCII; or gRPC does not allow the metadata:
                keys are lowercase ASCII and not reserved, values are printable ASCII.
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
