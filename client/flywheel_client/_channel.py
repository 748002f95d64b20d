"""How to reach a server: the address, the options of the channel, and what every call carries.

Both clients share this. Nothing of grpc is created here before a channel is opened, so that a process may fork until it
makes its first call (grpc#41768).
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

# The largest answer is that of GenerateAll: 16 samples, the default of `max_num_samples`, of 1,048,576 tokens, the longest
# contexts that are common, of 4 bytes each. grpc's default of 4 MiB would refuse text after it was generated; without a limit,
# a server could fill the client's memory. grpc holds a message about three times while it is read.
MAX_RECEIVE_MESSAGE_BYTES: Final = 64 * 2**20

# Seconds of silence after which a ping tests the connection, and to wait for its answer. By default servers in C++, Go, Java
# and Python end a connection, and every call on it, whose client pings more often than every 5 min (gRFC A8). What keeps a
# connection that is silent for long alive through load balancers and NAT are the pings of our server, which no client
# punishes, and each of which puts off the client's own.
KEEPALIVE_TIME_SECONDS: Final = 360
KEEPALIVE_TIMEOUT: Final = 20

# Seconds to connect to one of several endpoints, TLS and the first frame of HTTP/2 included.
CONNECT_TIMEOUT: Final = 4

CHANNEL_OPTIONS: Final[Mapping[str, int | str]] = {
    "grpc.max_receive_message_length": MAX_RECEIVE_MESSAGE_BYTES,
    # The server never compresses its answers. A small compressed message may be a large one, and some versions of grpc compare
    # its size with the limit only after it has been decompressed. 1 stands for no compression.
    "grpc.compression_enabled_algorithms_bitset": 1,
    "grpc.per_message_decompression": 0,
    "grpc.keepalive_time_ms": KEEPALIVE_TIME_SECONDS * 1000,
    "grpc.keepalive_timeout_ms": KEEPALIVE_TIMEOUT * 1000,
    # An idle channel has nothing to lose; its next call connects anew.
    "grpc.keepalive_permit_without_calls": 0,
    # By default pings stop after two without data, which is when a long silent call needs them.
    "grpc.http2.max_pings_without_data": 0,
    # A server that has restarted is found again within a second. By default the attempts grow two minutes apart.
    "grpc.initial_reconnect_backoff_ms": 200,
    "grpc.max_reconnect_backoff_ms": 1000,
    # The transparent retries of calls that no server has begun to work on. Other retries are in `_retry`.
    "grpc.enable_retries": 1,
    "grpc.primary_user_agent": f"flywheel-client/{__version__}",
}

# What a channel has besides: to a target, with calls only for servers that are SERVING by their health, or for any of them,
# which share their connections; and to an endpoint of a directory, which the client picks itself.
SERVING_ONLY_OPTIONS: Final[Mapping[str, int | str]] = {"grpc.service_config": BALANCING_CONFIG}
ANY_HEALTH_OPTIONS: Final[Mapping[str, int | str]] = {**SERVING_ONLY_OPTIONS, "grpc.inhibit_health_checking": 1}
ENDPOINT_OPTIONS: Final[Mapping[str, int | str]] = {
    "grpc.service_config": ENDPOINT_CONFIG,
    # Despite its name, the time that an attempt to connect may take: 20 s by default, for an address that is silent.
    "grpc.min_reconnect_backoff_ms": CONNECT_TIMEOUT * 1000,
}

MAX_REQUEST_ID_LENGTH: Final = 128
_VISIBLE_ASCII: Final = frozenset(string.ascii_letters + string.digits + string.punctuation)


class ClientDefault(enum.Enum):
    """Stands for the client's own timeout if a call does not set one, because None is a value: no deadline."""

    TIMEOUT = "timeout"


CLIENT_TIMEOUT: Final = ClientDefault.TIMEOUT
Timeout = float | ClientDefault | None


@dataclass(frozen=True, slots=True)
class CallOptions:
    """What one call carries besides its request."""

    timeout: float | None
    metadata: tuple[tuple[str, str | bytes], ...]
    request_id: str
    wait_for_ready: bool


def call_metadata(metadata: Sequence[tuple[str, str | bytes]], api_key: str | None) -> tuple[tuple[str, str | bytes], ...]:
    """Returns what every call of a client carries; raises `TypeError` or `ValueError` for what no header can hold."""
    checked = checked_metadata(metadata)
    if api_key is None:
        return checked
    if not api_key or not _VISIBLE_ASCII.issuperset(api_key):
        # Without the key itself: messages end up in logs.
        raise ValueError("api_key must be one or more visible ASCII characters")
    return (*checked, ("authorization", f"Bearer {api_key}"))


@dataclass(frozen=True, slots=True)
class Connection:
    """The arguments of a client, which every channel it opens and every call it makes take from here."""

    target: str | Directory
    timeout: float | None
    metadata: tuple[tuple[str, str | bytes], ...] = field(repr=False)
    channel_options: Sequence[tuple[str, Any]]
    credentials: grpc.ChannelCredentials | None
    retry: Retry | None
    wait_for_ready: bool

    def __post_init__(self) -> None:
        """Raises `TypeError` or `ValueError` for a target or a timeout that cannot be one."""
        if not callable(getattr(self.target, "read", None)):
            checked_target(self.target)
        object.__setattr__(self, "timeout", checked_timeout(self.timeout))

    @property
    def checks_health(self) -> bool:
        """Whether some channels look at the health of servers. Those of a directory do not: a refused call goes elsewhere."""
        return isinstance(self.target, str)

    def open(self, *, any_health: bool) -> grpc.Channel:
        """Returns a new channel for threads. With `any_health` its calls go to a server that is NOT_SERVING too."""
        if not isinstance(self.target, str):
            return cast("grpc.Channel", FailoverChannel(self.target, self._open, self.retry))
        channel = self._open(self.target, ANY_HEALTH_OPTIONS if any_health else SERVING_ONLY_OPTIONS)
        return cast("grpc.Channel", TargetChannel(self.target, channel, self.retry))

    def open_async(self, *, any_health: bool) -> grpc.aio.Channel:
        """The same for asyncio: the channel belongs to the running event loop."""
        if not isinstance(self.target, str):
            return cast("grpc.aio.Channel", AsyncFailoverChannel(self.target, self._open_async, self.retry))
        channel = self._open_async(self.target, ANY_HEALTH_OPTIONS if any_health else SERVING_ONLY_OPTIONS)
        return cast("grpc.aio.Channel", AsyncTargetChannel(self.target, channel, self.retry))

    def call_options(
        self, timeout: Timeout = CLIENT_TIMEOUT, request_id: str | None = None, wait_for_ready: bool | None = None
    ) -> CallOptions:
        """Returns the deadline and the metadata of a call. Without a request id it gets a new one.

        The client chooses the id, rather than the server, so that a call that never arrives has one too.
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
