"""A server that does what a test tells it to, for the tests of the client to call over the wire."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent import futures
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any as AnyType

import grpc
import pytest
from flywheel_client import AsyncClient, Client, FlywheelError, _pool
from flywheel_proto.v1 import generation_pb2, generation_pb2_grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.message import Message
from google.rpc import status_pb2
from google.rpc.error_details_pb2 import ErrorInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import HealthServicer

from tests.serving import free_ports

WAIT = 20.0
"""Seconds that a test waits for an event before the test fails."""

SERVICE = "flywheel.v1.GenerationService"


def delta(text: str, index: int = 0, tokens: int = 1, finish_reason: str = "") -> generation_pb2.GenerationDelta:
    finished = 1700000000.5 if finish_reason else 0.0
    return generation_pb2.GenerationDelta(
        index=index,
        text=text,
        generated_tokens=tokens,
        finished=finished,
        finish_reason=finish_reason,
        prompt_tokens=5 if finish_reason else 0,
    )


def sample(text: str, index: int = 0) -> generation_pb2.GenerationResponseSample:
    return generation_pb2.GenerationResponseSample(
        text=text,
        generated_tokens=2,
        finished=1700000000.5,
        finish_reason="stop",
        index=index,
        prompt_tokens=5,
        stop_sequence="###",
    )


@dataclass
class FakeService(generation_pb2_grpc.GenerationServiceServicer):
    """Answers every call with what the test has set, and records the requests."""

    address: str = ""
    deltas: list[generation_pb2.GenerationDelta] = field(default_factory=lambda: [delta("ab"), delta("c", 0, 2, "stop")])
    samples: list[generation_pb2.GenerationResponseSample] = field(default_factory=lambda: [sample("abc")])
    model_name: str = "SmolLM2-135M"
    supported_fields: Sequence[str] = tuple(generation_pb2.GenerationRequest.DESCRIPTOR.fields_by_name)
    holds: bool = False
    """Whether a generation waits, before it sends its initial metadata, until it is cancelled."""
    hangs: bool = False
    """Whether a generation waits, after its messages, until it is cancelled."""
    request_id: str | None = None
    """The id that calls get instead of the id that the caller sent."""
    refuses: bool = False
    """Whether the failure comes before any message, and without initial metadata."""
    recovers_after: int | None = None
    """How many generations fail; the default is all."""
    failure: tuple[grpc.StatusCode, str, tuple[tuple[str, bytes], ...]] | None = None
    """The status, message and trailing metadata with which a call ends after its messages."""

    stop: Callable[[], object] = lambda: None
    """Stops the server at once."""

    requests: list[generation_pb2.GenerationRequest] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)
    """The times at which the requests arrived, in seconds of `time.monotonic()`."""
    peers: set[str] = field(default_factory=set)
    """The connections of all calls."""
    metadata: list[dict[str, str | bytes]] = field(default_factory=list)
    seconds_remaining: list[float | None] = field(default_factory=list)
    called: threading.Event = field(default_factory=threading.Event)
    cancelled: threading.Event = field(default_factory=threading.Event)

    def fail(self, code: grpc.StatusCode, message: str, *details: Message) -> None:
        status = status_pb2.Status(code=code.value[0], message=message)
        for detail in details:
            packed = Any()
            packed.Pack(detail)
            status.details.append(packed)
        self.failure = (code, message, (("grpc-status-details-bin", status.SerializeToString()),))

    def Generate(
        self, request: generation_pb2.GenerationRequest, context: grpc.ServicerContext
    ) -> Iterator[generation_pb2.GenerationResponseSample]:
        self._begin(request, context)
        yield from self.samples
        self._end(context)

    def GenerateDeltas(
        self, request: generation_pb2.GenerationRequest, context: grpc.ServicerContext
    ) -> Iterator[generation_pb2.GenerationDelta]:
        self._begin(request, context)
        yield from self.deltas
        self._end(context)

    def GenerateAll(
        self, request: generation_pb2.GenerationRequest, context: grpc.ServicerContext
    ) -> generation_pb2.GenerationResponse:
        self._begin(request, context)
        self._end(context)
        return generation_pb2.GenerationResponse(
            created=1700000000.0,
            finished=1700000000.5,
            num_samples=len(self.samples),
            responses=self.samples,
            prompt=request.text,
            prompt_tokens=5,
        )

    def GetModel(self, request: generation_pb2.GetModelRequest, context: grpc.ServicerContext) -> generation_pb2.Model:
        del request
        self.peers.add(context.peer())
        self._fail(context)
        return generation_pb2.Model(
            name=self.model_name,
            engine="fake",
            context_tokens=2048,
            limits=generation_pb2.Limits(
                max_text_bytes=1048576,
                max_num_samples=16,
                max_eos_token_ids=64,
                max_stop_sequences=16,
                max_stop_bytes=256,
            ),
            defaults=generation_pb2.Defaults(num_samples=1, temperature=1.0, top_k=50, top_p=1.0),
            penalizes_prompt=True,
            prompt_format="chat",
            supported_fields=self.supported_fields,
        )

    def GetStats(self, request: generation_pb2.GetStatsRequest, context: grpc.ServicerContext) -> generation_pb2.Stats:
        del request
        self.peers.add(context.peer())
        self._fail(context)
        return generation_pb2.Stats(backlog=3, num_total_runners=1, active=2, queued=1)

    def Tokenize(
        self, request: generation_pb2.TokenizeRequest, context: grpc.ServicerContext
    ) -> generation_pb2.TokenizeResponse:
        self.peers.add(context.peer())
        self._fail(context)
        tokens = [generation_pb2.PromptToken(id=number, text=word.encode()) for number, word in enumerate(request.text.split())]
        return generation_pb2.TokenizeResponse(prompt_tokens=len(tokens), tokens=tokens)

    def _begin(self, request: generation_pb2.GenerationRequest, context: grpc.ServicerContext) -> None:
        metadata = dict(context.invocation_metadata())
        self.requests.append(request)
        self.arrivals.append(time.monotonic())
        self.peers.add(context.peer())
        self.metadata.append(metadata)
        self.seconds_remaining.append(context.time_remaining())
        self._answering = True
        self._ended = threading.Event()
        # Not after the wait in _end: if the caller is gone, grpc abandons the handler at its next yield.
        context.add_callback(self._note_end)
        own_id = self.request_id or str(metadata.get("x-request-id", "new"))
        self.called.set()
        if self.holds:
            self._ended.wait(WAIT)
        if self.refuses:
            self._fail(context, ("x-request-id", own_id))
        context.send_initial_metadata((("x-request-id", own_id),))

    def _note_end(self) -> None:
        if self._answering:
            self.cancelled.set()
        self._ended.set()

    def _end(self, context: grpc.ServicerContext) -> None:
        if self.hangs:
            self._ended.wait(WAIT)
        self._answering = False
        if not self.refuses:
            self._fail(context)

    def _fail(self, context: grpc.ServicerContext, *more_metadata: tuple[str, str]) -> None:
        if self.failure is not None and (self.recovers_after is None or len(self.requests) <= self.recovers_after):
            code, message, trailing_metadata = self.failure
            context.set_trailing_metadata((*trailing_metadata, *more_metadata))
            context.abort(code, message)


@pytest.fixture
def health() -> HealthServicer:
    """The health service of `fake`."""
    servicer = watchable()
    for name in ("", SERVICE):
        servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
    return servicer


def watchable() -> HealthServicer:
    """Returns a health servicer that uses a thread for each Watch.

    By default, it sends answers of a Watch while it holds a lock that the server needs when the stream ends. Then both may wait
    for each other for ever.
    """
    return HealthServicer(experimental_non_blocking=False)


@contextmanager
def serving_fake(
    health: HealthServicer | None = None,
    credentials: grpc.ServerCredentials | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    service: FakeService | None = None,
) -> Iterator[FakeService]:
    """Serves a `FakeService`, by default one of its own, in plaintext unless it has credentials."""
    service = service or FakeService()
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=16))
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(service, server)
    if health is not None:
        health_pb2_grpc.add_HealthServicer_to_server(health, server)
    address = f"127.0.0.1:{port}"
    port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    service.address = f"{host}:{port}"
    server.start()
    service.stop = lambda: server.stop(None).wait()
    try:
        yield service
    finally:
        server.stop(None).wait()


@pytest.fixture
def free_port() -> int:
    """A port of the loopback interface where nothing listens."""
    return free_ports(1)[0]


@pytest.fixture
def fake(health: HealthServicer) -> Iterator[FakeService]:
    with serving_fake(health) as service:
        yield service


@pytest.fixture
def fakes() -> Iterator[list[FakeService]]:
    """Three fake services, each with a server of its own."""
    with ExitStack() as stack:
        yield [stack.enter_context(serving_fake()) for _ in range(3)]


class Caller:
    """A client of either kind, with the same coroutines for both kinds."""

    def __init__(self, kind: type, target: AnyType, **arguments: AnyType) -> None:
        self.client: AnyType = kind(target, **arguments)
        self.is_async = kind is AsyncClient

    async def call(self, **arguments: AnyType) -> str:
        """Returns the prompt as the server has seen it."""
        answer = await self.ask(self.client.generate_all, "p", max_tokens=1, **arguments)
        return str(answer.prompt)

    async def stream(self, **arguments: AnyType) -> AnyType:
        arguments = {"text": "p", "max_tokens": 1} | arguments
        if self.is_async:
            return self.client.generate_deltas(**arguments)
        return await asyncio.to_thread(self.client.generate_deltas, **arguments)

    async def next(self, stream: AnyType) -> AnyType:
        """Returns the text of the next delta; None at the end."""
        delta = await (anext(stream, None) if self.is_async else asyncio.to_thread(next, stream, None))
        return None if delta is None else delta.text

    async def rest(self, stream: AnyType) -> None:
        """Reads to the end."""
        while await self.next(stream) is not None:
            pass

    async def close_stream(self, stream: AnyType) -> None:
        await (stream.aclose() if self.is_async else asyncio.to_thread(stream.close))

    async def close(self) -> None:
        await self.ask(self.client.close)

    async def ask(self, function: Callable[..., AnyType], *arguments: AnyType, **keywords: AnyType) -> AnyType:
        if self.is_async:
            return await function(*arguments, **keywords)
        return await asyncio.to_thread(function, *arguments, **keywords)

    @property
    def pool(self) -> _pool.Pool[AnyType]:
        (channel,) = self.client._channels.values()
        pool: _pool.Pool[AnyType] = channel._pool
        return pool

    async def expect(self, kind: type[FlywheelError], match: str | None = None, **arguments: AnyType) -> FlywheelError:
        with pytest.raises(kind, match=match) as caught:
            await self.call(**arguments)
        with pytest.raises(kind, match=match):
            await self.next(await self.stream(**arguments))
        return caught.value


@pytest.fixture(autouse=True)
def hurried_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets clients read their directory more often than they should read a real one."""
    monkeypatch.setattr(_pool, "MIN_READ_INTERVAL_SECONDS", 0.05)


@pytest.fixture(params=(Client, AsyncClient), ids=["threads", "asyncio"])
async def caller(request: AnyType) -> AsyncIterator[Callable[..., Caller]]:
    """Makes clients of one kind, and closes them. A test runs once with each kind."""
    async with AsyncExitStack() as stack:

        def make(*arguments: AnyType, **keywords: AnyType) -> Caller:
            made = Caller(request.param, *arguments, **keywords)
            stack.push_async_callback(made.close)
            return made

        yield make


async def happened(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, WAIT)


def unavailable(fake: FakeService, reason: str = "ENGINE_UNAVAILABLE") -> None:
    """Makes the server refuse every generation, as a draining server does."""
    fake.refuses = True
    fake.fail(grpc.StatusCode.UNAVAILABLE, "stopping", ErrorInfo(reason=reason, domain="flywheel.v1"))
