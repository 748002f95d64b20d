"""The calls of the soak: every method, every way to end a call, and the expected status of each."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from random import Random
from typing import Any, Final

import grpc
import grpc.aio
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_proto.v1 import generation_pb2_grpc
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.serving import drained, through_a_cable

FAIL_ON: Final = "Fail, please."
"""The text in a prompt that makes the engine fail."""
FAIL_AFTER: Final = 3
"""Tokens after which the engine fails."""
PROMPT_DELAY: Final = 0.05
TOKEN_DELAY: Final = 0.01
MAX_MESSAGE_BYTES: Final = 2**16

_METHODS: Final = ("Generate", "GenerateDeltas", "GenerateAll")
_SERVICE: Final = pb.DESCRIPTOR.services_by_name["GenerationService"].full_name
# So long that the call always ends in another way first.
_ENDLESS: Final = pb.GenerationRequest(text="Tell me of the llama.", max_tokens=6000)
_INVALID: Final = (
    pb.GenerationRequest(),
    pb.GenerationRequest(text="x", max_tokens=-1, top_p=2, stop=[""]),
    pb.GenerationRequest(text="x", max_tokens=1, num_samples=1000),
    pb.GenerationRequest(text="x" * 4096, max_tokens=8000),
)


class Calls:
    """Makes calls to a server, over a few lasting connections and many short ones. Each method returns the call's status."""

    def __init__(self, address: str, key: str, random: Random) -> None:
        self._address = address
        self._key = (("authorization", f"Bearer {key}"),)
        self._random = random
        self._channels = [_channel(address) for _ in range(4)]

    async def close(self) -> None:
        """Closes the lasting connections."""
        for channel in self._channels:
            await channel.close()

    async def finished(self) -> StatusCode:
        """A generation of 1 to 16 tokens that is read to its end."""
        return await _read(self._generate(self._any(), self._request()))

    async def failed(self) -> StatusCode:
        """A generation that fails in the engine."""
        request = self._request()
        request.text += FAIL_ON
        request.max_tokens += FAIL_AFTER
        return await _read(self._generate(self._any(), request))

    async def cancelled_before_a_message(self) -> StatusCode:
        """A generation that is cancelled before its first token, mostly while the prompt is read."""
        call = self._generate(self._any())
        await asyncio.sleep(self._random.uniform(0, PROMPT_DELAY))
        return await _cancel(call)

    async def cancelled_midway(self) -> StatusCode:
        """A stream that is cancelled after its first messages."""
        call = self._generate(self._any(), method="GenerateDeltas")
        for _ in range(self._random.randint(1, 16)):
            await call.read()
        return await _cancel(call)

    async def cancelled_by_deadline(self) -> StatusCode:
        """A generation whose deadline passes."""
        return await _read(self._generate(self._any(), timeout=self._random.uniform(0.01, 0.4)))

    async def cancelled_by_closing(self) -> StatusCode:
        """A generation whose client closes its connection normally."""
        async with _channel(self._address) as channel:
            call = self._generate(channel)
            await asyncio.sleep(self._random.uniform(0, 0.3))
        return await _status(call)

    async def cancelled_by_cutting(self) -> StatusCode:
        """A generation whose connection is cut."""
        async with through_a_cable(self._address) as cable, _channel(cable.address) as channel:
            await channel.channel_ready()
            call = self._generate(channel)
            await asyncio.sleep(self._random.uniform(0.02, 0.3))
            cable.cut()
            return await _status(call)

    async def watched(self) -> StatusCode:
        """A health watch, which the caller cancels."""
        call = health_pb2_grpc.HealthStub(self._any()).Watch(health_pb2.HealthCheckRequest(service=_SERVICE))
        await call.read()
        await asyncio.sleep(self._random.uniform(0, 0.5))
        return await _cancel(call)

    async def checked(self) -> StatusCode:
        """A health check."""
        return await _read(health_pb2_grpc.HealthStub(self._any()).Check(health_pb2.HealthCheckRequest(service=_SERVICE)))

    async def model(self) -> StatusCode:
        """GetModel."""
        return await _read(self._stub(self._any()).GetModel(pb.GetModelRequest(), metadata=self._key))

    async def stats(self) -> StatusCode:
        """GetStats."""
        return await _read(self._stub(self._any()).GetStats(pb.GetStatsRequest(), metadata=self._key))

    async def reflected(self) -> StatusCode:
        """A reflection request."""
        question = reflection_pb2.ServerReflectionRequest(file_containing_symbol=_SERVICE)
        stub = reflection_pb2_grpc.ServerReflectionStub(self._any())
        return await _read(stub.ServerReflectionInfo(iter((question,))))

    async def invalid(self) -> StatusCode:
        """A generation with fields that are out of range."""
        return await _read(self._generate(self._any(), self._random.choice(_INVALID)))

    async def malformed(self) -> StatusCode:
        """Bytes that are not a valid message."""
        return await _read(self._send("GenerateAll", b"\xff\xff"))

    async def too_large(self) -> StatusCode:
        """A message that exceeds the server's limit."""
        request = pb.GenerationRequest(text="x" * (MAX_MESSAGE_BYTES + 1), max_tokens=1)
        # grpcio 1.85.1 takes up to a second to refuse it, and never does if the connection reaches its maximum age first.
        async with _channel(self._address) as channel:
            return await _read(self._generate(channel, request))

    async def unknown(self) -> StatusCode:
        """A method that does not exist."""
        return await _read(self._send("Nothing", b""))

    async def without_a_key(self) -> StatusCode:
        """A generation without a key, or with a wrong key."""
        wrong = (("authorization", "Bearer not-the-key-of-this-server"),)
        return await _read(self._generate(self._any(), metadata=self._random.choice(((), wrong))))

    def _any(self) -> grpc.aio.Channel:
        return self._random.choice(self._channels)

    def _request(self) -> pb.GenerationRequest:
        return pb.GenerationRequest(
            text="All about llamas. " * self._random.randint(1, 100),
            max_tokens=self._random.randint(1, 16),
            num_samples=self._random.choice((1, 1, 1, 2, 4)),
            stop=self._random.choice(([], ["never"])),
        )

    def _generate(
        self,
        channel: grpc.aio.Channel,
        request: pb.GenerationRequest = _ENDLESS,
        *,
        method: str | None = None,
        timeout: float | None = None,
        metadata: tuple[tuple[str, str], ...] | None = None,
    ) -> Any:  # noqa: ANN401 - a call of grpc.aio, streaming or not
        start = getattr(self._stub(channel), method or self._random.choice(_METHODS))
        return start(request, timeout=timeout, metadata=self._key if metadata is None else metadata)

    def _send(self, method: str, data: bytes) -> Any:  # noqa: ANN401 - types do not know calls without a serializer
        call: Any = self._any().unary_unary(f"/{_SERVICE}/{method}")
        return call(data, metadata=self._key)

    def _stub(self, channel: grpc.aio.Channel) -> Any:  # noqa: ANN401 - the generated types know only the synchronous stub
        return generation_pb2_grpc.GenerationServiceStub(channel)


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of calls: its share of 1000 calls, the expected status, and the method that makes a call."""

    per_thousand: int
    status: StatusCode
    call: Callable[[Calls], Awaitable[StatusCode]]

    @property
    def name(self) -> str:
        """The description of the kind."""
        return str(self.call.__doc__).rstrip(".")


KINDS: Final = (
    Kind(450, StatusCode.OK, Calls.finished),
    Kind(50, StatusCode.INTERNAL, Calls.failed),
    Kind(45, StatusCode.CANCELLED, Calls.cancelled_before_a_message),
    Kind(45, StatusCode.CANCELLED, Calls.cancelled_midway),
    Kind(45, StatusCode.DEADLINE_EXCEEDED, Calls.cancelled_by_deadline),
    Kind(20, StatusCode.CANCELLED, Calls.cancelled_by_closing),
    Kind(25, StatusCode.UNAVAILABLE, Calls.cancelled_by_cutting),
    Kind(20, StatusCode.CANCELLED, Calls.watched),
    Kind(50, StatusCode.OK, Calls.checked),
    Kind(50, StatusCode.OK, Calls.model),
    Kind(50, StatusCode.OK, Calls.stats),
    Kind(40, StatusCode.OK, Calls.reflected),
    Kind(40, StatusCode.INVALID_ARGUMENT, Calls.invalid),
    Kind(20, StatusCode.INVALID_ARGUMENT, Calls.malformed),
    Kind(10, StatusCode.RESOURCE_EXHAUSTED, Calls.too_large),
    Kind(10, StatusCode.UNIMPLEMENTED, Calls.unknown),
    Kind(30, StatusCode.UNAUTHENTICATED, Calls.without_a_key),
)


def _channel(address: str) -> grpc.aio.Channel:
    # With a connection of its own: otherwise channels to the same address share one.
    return grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])


async def _status(call: Any) -> StatusCode:  # noqa: ANN401 - any call of grpc.aio
    code: StatusCode = await call.code()
    return code


async def _cancel(call: Any) -> StatusCode:  # noqa: ANN401
    call.cancel()
    return await _status(call)


async def _read(call: Any) -> StatusCode:  # noqa: ANN401
    with suppress(grpc.aio.AioRpcError):
        await drained(call)
    return await _status(call)
