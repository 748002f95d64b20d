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
from google.protobuf.wrappers_pb2 import Int32Value, StringValue

from flywheel_client._async_failover import AsyncFailoverChannel
from flywheel_client._errors import REQUEST_ID_KEY
from flywheel_client._failover import FailoverChannel
from flywheel_client._pool import Directory

# The caller decided how much text it asks for; grpc's default of 4 MiB would refuse it after it was generated.
MAX_RECEIVE_MESSAGE_BYTES: Final = -1

# Seconds of silence after which a ping tests the connection, and to wait for its answer. Long generations are silent,
# and load balancers and NAT drop silent connections after minutes. The server permits a ping every 10 s.
KEEPALIVE_TIME: Final = 60
KEEPALIVE_TIMEOUT: Final = 20

CHANNEL_OPTIONS: Final[Mapping[str, int | str]] = {
    "grpc.max_receive_message_length": MAX_RECEIVE_MESSAGE_BYTES,
    "grpc.keepalive_time_ms": KEEPALIVE_TIME * 1000,
    "grpc.keepalive_timeout_ms": KEEPALIVE_TIMEOUT * 1000,
    # An idle channel has nothing to lose; its next call connects anew.
    "grpc.keepalive_permit_without_calls": 0,
    # By default pings stop after two without data, which is when a long silent call needs them.
    "grpc.http2.max_pings_without_data": 0,
    # Only the transparent retries of calls that no server has begun to work on: no service config asks for others.
    "grpc.enable_retries": 1,
    "grpc.primary_user_agent": f"flywheel-client/{__version__}",
}

MAX_REQUEST_ID_LENGTH: Final = 128
_VISIBLE_ASCII: Final = frozenset(string.ascii_letters + string.digits + string.punctuation)

# grpc.health.v1.Health by hand, so that the client does not need grpcio-health-checking, which wants a protobuf of its
# own age (grpc#42906). On the wire its messages are what those of the well-known wrappers are: one value in field 1.
HEALTH_CHECK: Final = "/grpc.health.v1.Health/Check"
health_request = StringValue.SerializeToString
health_response = Int32Value.FromString
_SERVING_STATUS: Final = {0: "UNKNOWN", 1: "SERVING", 2: "NOT_SERVING", 3: "SERVICE_UNKNOWN"}


def serving_status(response: Int32Value) -> str:
    """Returns the name of the ServingStatus in a HealthCheckResponse."""
    return _SERVING_STATUS.get(response.value, str(response.value))


class ClientDefault(enum.Enum):
    """Stands for the client's own timeout where a call does not set one, because None is a value: no deadline."""

    TIMEOUT = "timeout"


CLIENT_TIMEOUT: Final = ClientDefault.TIMEOUT
Timeout = float | ClientDefault | None


@dataclass(frozen=True, slots=True)
class CallOptions:
    """What one call carries besides its request."""

    timeout: float | None
    metadata: tuple[tuple[str, str | bytes], ...]
    request_id: str


def call_metadata(metadata: Sequence[tuple[str, str | bytes]], api_key: str | None) -> tuple[tuple[str, str | bytes], ...]:
    """Returns what every call of a client carries; raises `ValueError` for a key that no header can hold."""
    if api_key is None:
        return tuple(metadata)
    if not api_key or not _VISIBLE_ASCII.issuperset(api_key):
        # Without the key itself: messages end up in logs.
        raise ValueError("api_key must be one or more visible ASCII characters")
    return (*metadata, ("authorization", f"Bearer {api_key}"))


@dataclass(frozen=True, slots=True)
class Connection:
    """The arguments of a client, which every channel it opens and every call it makes take from here."""

    target: str | Directory
    timeout: float | None
    metadata: tuple[tuple[str, str | bytes], ...] = field(repr=False)
    channel_options: Sequence[tuple[str, Any]]
    credentials: grpc.ChannelCredentials | None

    def open(self) -> grpc.Channel:
        """Returns a new channel for threads."""
        if isinstance(self.target, str):
            return self._open(self.target)
        return cast("grpc.Channel", FailoverChannel(self.target, self._open))

    def open_async(self) -> grpc.aio.Channel:
        """Returns a new channel that belongs to the running event loop."""
        if isinstance(self.target, str):
            return self._open_async(self.target)
        return cast("grpc.aio.Channel", AsyncFailoverChannel(self.target, self._open_async))

    def call_options(self, timeout: Timeout = CLIENT_TIMEOUT, request_id: str | None = None) -> CallOptions:
        """Returns the deadline and the metadata of a call. Without a request id it gets a new one.

        The client chooses the id, rather than the server, so that a call that never arrives has one too.
        """
        if request_id is None:
            request_id = uuid.uuid4().hex
        elif not 1 <= len(request_id) <= MAX_REQUEST_ID_LENGTH or not _VISIBLE_ASCII.issuperset(request_id):
            raise ValueError(f"request_id must be 1 to {MAX_REQUEST_ID_LENGTH} visible ASCII characters")
        return CallOptions(
            timeout=self.timeout if isinstance(timeout, ClientDefault) else timeout,
            metadata=(*self.metadata, (REQUEST_ID_KEY, request_id)),
            request_id=request_id,
        )

    def _open(self, address: str) -> grpc.Channel:
        if self.credentials is None:
            return grpc.insecure_channel(address, self._options())
        return grpc.secure_channel(address, self.credentials, self._options())

    def _open_async(self, address: str) -> grpc.aio.Channel:
        if self.credentials is None:
            return grpc.aio.insecure_channel(address, self._options())
        return grpc.aio.secure_channel(address, self.credentials, self._options())

    def _options(self) -> list[tuple[str, Any]]:
        return list((dict(CHANNEL_OPTIONS) | dict(self.channel_options)).items())
