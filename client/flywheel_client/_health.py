"""Checks the health of servers, and probes endpoints.

This implements grpc.health.v1.Health without grpcio-health-checking, because that package requires a protobuf as new as itself
(grpc#42906). On the wire, the messages of the service equal the well-known wrappers: one value in field 1.
"""

import asyncio
from collections.abc import Iterable
from typing import Final

import grpc
import grpc.aio
from google.protobuf.wrappers_pb2 import Int32Value, StringValue

from flywheel_client._targets import proxy_options

HEALTH_CHECK: Final = "/grpc.health.v1.Health/Check"
health_request = StringValue.SerializeToString
health_response = Int32Value.FromString

PROBE_TIMEOUT: Final = 6.0
"""Seconds that an endpoint may take to answer a probe."""

_NOT_SERVING: Final = 2
_SERVING_STATUS: Final = {0: "UNKNOWN", 1: "SERVING", _NOT_SERVING: "NOT_SERVING", 3: "SERVICE_UNKNOWN"}


def serving_status(response: Int32Value) -> str:
    """Returns the name of the ServingStatus in a HealthCheckResponse."""
    return _SERVING_STATUS.get(response.value, str(response.value))


def is_not_serving(response: Int32Value | None) -> bool:
    """Returns whether the server answers that it refuses calls.

    The response is None if the check ended with OK but without a message.
    """
    return response is not None and response.value == _NOT_SERVING


_NO_ANSWER: Final = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
    }
)
"""Statuses of a check that no endpoint answered, or one that is stopping. INTERNAL and UNKNOWN come from a proxy that has lost
its server. With any other status, the endpoint has answered."""

PROBE_TIMED_OUT: Final = f"silent for {PROBE_TIMEOUT:g} s"

LATE_ANSWER_SECONDS: Final = 0.1
"""Extra seconds for an event loop that was blocked, to process an answer that arrived in time."""

MAX_PROBES: Final = 64
"""How many endpoints are probed at the same time: enough that silent ones do not delay a live one."""


async def probe(channel: grpc.aio.Channel) -> tuple[str | None, bool]:
    """Returns why the endpoint does not answer (None if it does), and whether it answers that it refuses calls."""

    async def ask() -> tuple[str | None, bool]:
        try:
            answer = await channel.unary_unary(HEALTH_CHECK, health_request, health_response)(StringValue())
        except grpc.aio.AioRpcError as error:
            return no_answer(error.code(), error.details()), False
        # grpc.aio returns None for bytes that are not a HealthCheckResponse.
        return None, is_not_serving(answer)

    asking = asyncio.create_task(ask())
    try:
        # Not a deadline of grpc: grpc uses the wall clock, which may be wrong or change.
        for seconds in (PROBE_TIMEOUT, LATE_ANSWER_SECONDS):
            if not asking.done():
                await asyncio.wait({asking}, timeout=seconds)
        return asking.result() if asking.done() else (PROBE_TIMED_OUT, False)
    finally:
        asking.cancel()


def no_answer(code: grpc.StatusCode, details: str | None) -> str | None:
    """Returns why an endpoint does not answer, by the status of its check; None if it does answer."""
    return (details or code.name) if code in _NO_ANSWER else None


async def answering(addresses: Iterable[str], credentials: grpc.ChannelCredentials) -> set[str]:
    """Returns the addresses that answer a probe, even if they answer NOT_SERVING."""
    free = asyncio.Semaphore(MAX_PROBES)

    async def answers(address: str) -> bool:
        async with free, grpc.aio.secure_channel(address, credentials, list(proxy_options(address).items())) as channel:
            reason, _ = await probe(channel)
            return reason is None

    unique = list(dict.fromkeys(addresses))
    found = await asyncio.gather(*map(answers, unique))
    return {address for address, answered in zip(unique, found, strict=True) if answered}
