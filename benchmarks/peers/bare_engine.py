"""A bare grpc.aio server with our scripted engine. It shows what the engine costs without the rest of our server.

python -m benchmarks.peers.bare_engine --text TEXT --delay SECONDS
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Final

import uvloop
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_proto.v1 import generation_pb2_grpc
from flywheel_server.engines.base import Event, TextDelta
from flywheel_server.engines.scripted import Script, ScriptedEngine
from flywheel_server.messages import GenerationRequest, GenerationResponseSample

from benchmarks.peers import bare
from benchmarks.scenarios import UNLIMITED

MAX_WAITING: Final = 64
"""Maximum number of events that wait for a stream. Then the engine pauses."""


class QueueSink:
    """A sink that puts the events of one generation into a queue, with None at the end."""

    def __init__(self) -> None:
        self.events: asyncio.Queue[Event | None] = asyncio.Queue()

    @property
    def is_full(self) -> bool:
        """Whether `MAX_WAITING` events wait."""
        return self.events.qsize() >= MAX_WAITING

    def emit(self, event: Event) -> None:
        """Puts an event into the queue."""
        self.events.put_nowait(event)


class EngineService(generation_pb2_grpc.GenerationServiceServicer):
    """A servicer that turns each event of the engine into a message."""

    def __init__(self, engine: ScriptedEngine) -> None:
        self._engine = engine

    async def GenerateDeltas(self, request: pb.GenerationRequest, context: Any) -> AsyncIterator[pb.GenerationDelta]:
        """Yields a delta for each token, and a last one."""
        async for event in self._events(request):
            if isinstance(event, TextDelta):
                yield pb.GenerationDelta(text=event.text, generated_tokens=event.generated_tokens)
            elif isinstance(event, GenerationResponseSample):
                yield pb.GenerationDelta(generated_tokens=event.generated_tokens, finish_reason=event.finish_reason)

    async def GenerateAll(self, request: pb.GenerationRequest, context: Any) -> pb.GenerationResponse:
        """Returns the whole text."""
        samples = [
            pb.GenerationResponseSample(text=event.text, generated_tokens=event.generated_tokens)
            async for event in self._events(request)
            if isinstance(event, GenerationResponseSample)
        ]
        return pb.GenerationResponse(num_samples=len(samples), responses=samples, prompt=request.text)

    async def _events(self, request: pb.GenerationRequest) -> AsyncIterator[Event]:
        prepared = await self._engine.prepare(GenerationRequest(text=request.text, max_tokens=request.max_tokens))
        sink = QueueSink()
        generating = asyncio.create_task(self._engine.generate(prepared, sink))
        generating.add_done_callback(lambda _: sink.events.put_nowait(None))
        try:
            while (event := await sink.events.get()) is not None:
                yield event
            await generating
        finally:
            generating.cancel()


async def main() -> None:
    """Serves until the process ends."""
    chosen = bare.arguments()
    script = Script(text=chosen.text, token_delay=chosen.delay, slots=UNLIMITED)
    async with ScriptedEngine(script) as engine:
        await bare.serve(EngineService(engine))  # type: ignore[abstract] # gRPC answers the other methods


if __name__ == "__main__":
    uvloop.run(main())
