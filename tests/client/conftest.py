"""A server that does what a test tells it to, for the tests of the client to call over the wire."""

import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import grpc
import pytest
from flywheel_proto.v1 import generation_pb2, generation_pb2_grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.message import Message
from google.rpc import status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import HealthServicer

WAIT = 20.0
"""Seconds after which something that a test waits for is taken as not happening."""


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
    """Answers every call with what the test has put here, and notes what it was asked."""

    address: str = ""
    deltas: list[generation_pb2.GenerationDelta] = field(default_factory=lambda: [delta("ab"), delta("c", 0, 2, "stop")])
    samples: list[generation_pb2.GenerationResponseSample] = field(default_factory=lambda: [sample("abc")])
    hangs: bool = False
    """After its messages a generation waits until it is cancelled."""
    request_id: str | None = None
    """Is answered instead of the caller's."""
    refuses: bool = False
    """The failure comes before any message."""
    failure: tuple[grpc.StatusCode, str, tuple[tuple[str, bytes], ...]] | None = None
    """After its messages a call ends with this status, message and trailing metadata."""

    stop: Callable[[], object] = lambda: None
    """Stops the server at once."""

    requests: list[generation_pb2.GenerationRequest] = field(default_factory=list)
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
        self._fail(context)
        return generation_pb2.Model(
            name="SmolLM2-135M",
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
        )

    def GetStats(self, request: generation_pb2.GetStatsRequest, context: grpc.ServicerContext) -> generation_pb2.Stats:
        del request
        self._fail(context)
        return generation_pb2.Stats(backlog=3, num_total_runners=1, active=2, queued=1)

    def _begin(self, request: generation_pb2.GenerationRequest, context: grpc.ServicerContext) -> None:
        metadata = dict(context.invocation_metadata())
        self.requests.append(request)
        self.metadata.append(metadata)
        self.seconds_remaining.append(context.time_remaining())
        self._answering = True
        self._ended = threading.Event()
        # Not after the wait in _end: grpc abandons a handler that yields to a caller who is gone.
        context.add_callback(self._note_end)
        context.send_initial_metadata((("x-request-id", self.request_id or str(metadata["x-request-id"])),))
        self.called.set()
        if self.refuses:
            self._fail(context)

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

    def _fail(self, context: grpc.ServicerContext) -> None:
        if self.failure is not None:
            code, message, trailing_metadata = self.failure
            context.set_trailing_metadata(trailing_metadata)
            context.abort(code, message)


@pytest.fixture
def health() -> HealthServicer:
    """The health service of `fake`."""
    servicer = HealthServicer()
    servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    return servicer


@contextmanager
def serving_fake(
    health: HealthServicer | None = None,
    credentials: grpc.ServerCredentials | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
) -> Iterator[FakeService]:
    """Serves a `FakeService` of its own, in plaintext unless it has credentials."""
    service = FakeService()
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
def fake(health: HealthServicer) -> Iterator[FakeService]:
    with serving_fake(health) as service:
        yield service


@pytest.fixture
def fakes() -> Iterator[list[FakeService]]:
    """Three of them."""
    with ExitStack() as stack:
        yield [stack.enter_context(serving_fake()) for _ in range(3)]
