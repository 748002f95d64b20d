"""Opens channels for both clients: the address, the options of the channel, and the metadata of every call.

No object of grpc is created before a channel is opened, so that a process may fork until its first call (grpc#41768).
"""

import enum
import string
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, cast

import grpc
import grpc.aio
from flywheel_proto import __version__

from flywheel_client._calls_async import AsyncTargetChannel
from flywheel_client._calls_sync import TargetChannel
from flywheel_client._errors import REQUEST_ID_KEY
from flywheel_client._failover_async import AsyncFailoverChannel
from flywheel_client._failover_sync import FailoverChannel
from flywheel_client._metadata import checked_metadata
from flywheel_client._pool import Directory
from flywheel_client._retry import Retry
from flywheel_client._service_config import BALANCING_CONFIG, ENDPOINT_CONFIG
from flywheel_client._targets import PROXY_OPTIONS, checked_target, proxy_options
from flywheel_client._timeouts import checked_timeout

# The largest answer is one of GenerateAll: 16 samples (the default of `max_num_samples`) of 1,048,576 tokens (the longest
# context in common use) of 4 bytes. grpc's default limit of 4 MiB would refuse text after it was generated. Without a limit, a
# server could fill the client's memory: grpc holds a message about three times while it reads the message.
MAX_RECEIVE_MESSAGE_BYTES: Final = 64 * 2**20

# Seconds of silence before a ping tests the connection, and seconds to wait for its answer. If a client pings more often than
# every 5 minutes, servers in C++, Go, Java and Python by default end the connection and all its calls (gRFC A8). But load
# balancers and NAT may drop a silent connection earlier. So our server pings more often: clients accept that, and each ping of
# the server postpones the client's ping.
KEEPALIVE_TIME_SECONDS: Final = 360
KEEPALIVE_TIMEOUT: Final = 20

# Seconds to connect to an endpoint of a directory, including TLS and the first frame of HTTP/2.
CONNECT_TIMEOUT: Final = 4

CHANNEL_OPTIONS: Final[Mapping[str, int | str]] = {
    "grpc.max_receive_message_length": MAX_RECEIVE_MESSAGE_BYTES,
    # The server never compresses its answers. A small compressed message may become a large one, and some versions of grpc
    # check the limit only after decompression. 1 means: accept only uncompressed messages.
    "grpc.compression_enabled_algorithms_bitset": 1,
    "grpc.per_message_decompression": 0,
    "grpc.keepalive_time_ms": KEEPALIVE_TIME_SECONDS * 1000,
    "grpc.keepalive_timeout_ms": KEEPALIVE_TIMEOUT * 1000,
    # An idle channel needs no pings: its next call reconnects.
    "grpc.keepalive_permit_without_calls": 0,
    # By default, pings stop after two without data in between, but a long silent call needs them.
    "grpc.http2.max_pings_without_data": 0,
    # Finds a restarted server within a second. By default, the delay between attempts grows to two minutes.
    "grpc.initial_reconnect_backoff_ms": 200,
    "grpc.max_reconnect_backoff_ms": 1000,
    # grpc's transparent retries, of calls that no server has seen. All other retries are in `_retry`.
    "grpc.enable_retries": 1,
    "grpc.primary_user_agent": f"flywheel-client/{__version__}",
}

# Further options, by the kind of channel. A channel to a target calls only servers whose health is SERVING, or any server; both
# share their connections. A channel to an endpoint of a directory needs no balancing, because the client picks the endpoint.
SERVING_ONLY_OPTIONS: Final[Mapping[str, int | str]] = {"grpc.service_config": BALANCING_CONFIG}
ANY_HEALTH_OPTIONS: Final[Mapping[str, int | str]] = {**SERVING_ONLY_OPTIONS, "grpc.inhibit_health_checking": 1}
ENDPOINT_OPTIONS: Final[Mapping[str, int | str]] = {
    "grpc.service_config": ENDPOINT_CONFIG,
    # Despite its name, this is the timeout of an attempt to connect. Its default is 20 s.
    "grpc.min_reconnect_backoff_ms": CONNECT_TIMEOUT * 1000,
}

MAX_REQUEST_ID_LENGTH: Final = 128
_VISIBLE_ASCII: Final = frozenset(string.ascii_letters + string.digits + string.punctuation)


class ClientDefault(enum.Enum):
    """The default of a call's timeout: the client's own timeout. None cannot be the default, because it means no deadline."""

    TIMEOUT = "timeout"


CLIENT_TIMEOUT: Final = ClientDefault.TIMEOUT
Timeout = float | ClientDefault | None


@dataclass(frozen=True, slots=True)
class CallOptions:
    """The options of one call."""

    timeout: float | None
    metadata: tuple[tuple[str, str | bytes], ...]
    request_id: str
    wait_for_ready: bool


def call_metadata(metadata: Sequence[tuple[str, str | bytes]], api_key: str | None) -> tuple[tuple[str, str | bytes], ...]:
    """Returns the metadata of every call of a client; raises `TypeError` or `ValueError` if no header can hold them."""
    checked = checked_metadata(metadata)
    if api_key is None:
        return checked
    if not api_key or not _VISIBLE_ASCII.issuperset(api_key):
        # The message does not show the key: messages end up in logs.
        raise ValueError("api_key must be one or more visible ASCII characters")
    return (*checked, ("authorization", f"Bearer {api_key}"))


@dataclass(frozen=True, slots=True)
class Connection:
    """The arguments of a client, for all its channels and calls."""

    target: str | Directory
    timeout: float | None
    metadata: tuple[tuple[str, str | bytes], ...] = field(repr=False)
    channel_options: Sequence[tuple[str, Any]]
    credentials: grpc.ChannelCredentials | None
    retry: Retry | None
    wait_for_ready: bool

    def __post_init__(self) -> None:
        """Raises `TypeError` or `ValueError` if the target or the timeout is invalid."""
        if not callable(getattr(self.target, "read", None)):
            checked_target(self.target)
        object.__setattr__(self, "timeout", checked_timeout(self.timeout))

    @property
    def checks_health(self) -> bool:
        """Whether channels check the health of servers. Channels to a directory do not: refused calls try another endpoint."""
        return isinstance(self.target, str)

    def open(self, *, any_health: bool) -> grpc.Channel:
        """Returns a new channel for threads. With `any_health`, its calls also go to servers that are NOT_SERVING."""
        if not isinstance(self.target, str):
            return cast("grpc.Channel", FailoverChannel(self.target, self._open, self.retry))
        channel = self._open(self.target, ANY_HEALTH_OPTIONS if any_health else SERVING_ONLY_OPTIONS)
        return cast("grpc.Channel", TargetChannel(self.target, channel, self.retry))

    def open_async(self, *, any_health: bool) -> grpc.aio.Channel:
        """Returns a new channel for asyncio, which belongs to the running event loop. `any_health` is as in `open`."""
        if not isinstance(self.target, str):
            return cast("grpc.aio.Channel", AsyncFailoverChannel(self.target, self._open_async, self.retry))
        channel = self._open_async(self.target, ANY_HEALTH_OPTIONS if any_health else SERVING_ONLY_OPTIONS)
        return cast("grpc.aio.Channel", AsyncTargetChannel(self.target, channel, self.retry))

    def call_options(
        self, timeout: Timeout = CLIENT_TIMEOUT, request_id: str | None = None, wait_for_ready: bool | None = None
    ) -> CallOptions:
        """Returns the options of a call, with a new request id if the caller gives none.

        The client chooses the id, and not the server, so that a call that never arrives has an id too.
        """
        if request_id is None:
            request_id = uuid.uuid4().hex
        elif not 1 <= len(request_id) <= MAX_REQUEST_ID_LENGTH or not _VISIBLE_ASCII.issuperset(request_id):
            raise ValueError(f"request_id must be 1 to {MAX_REQUEST_ID_LENGTH} visible ASCII characters")
        return CallOptions(
            timeout=self.timeout if isinstance(timeout, ClientDefault) else checked_timeout(timeout),
            metadata=(*self.metadata, (REQUEST_ID_KEY, request_id)),
            request_id=request_id,
            wait_for_ready=self.wait_for_ready if wait_for_ready is None else wait_for_ready,
        )

    def _open(self, address: str, balancing: Mapping[str, int | str] = ENDPOINT_OPTIONS) -> grpc.Channel:
        options = self._options(address, balancing)
        if self.credentials is None:
            return grpc.insecure_channel(address, options)
        return grpc.secure_channel(address, self.credentials, options)

    def _open_async(self, address: str, balancing: Mapping[str, int | str] = ENDPOINT_OPTIONS) -> grpc.aio.Channel:
        options = self._options(address, balancing)
        if self.credentials is None:
            return grpc.aio.insecure_channel(address, options)
        return grpc.aio.secure_channel(address, self.credentials, options)

    def _options(self, address: str, balancing: Mapping[str, int | str]) -> list[tuple[str, Any]]:
        own = dict(self.channel_options)
        proxy = {} if own.keys() & PROXY_OPTIONS else proxy_options(address)
        return list({**CHANNEL_OPTIONS, **balancing, **proxy, **own}.items())
