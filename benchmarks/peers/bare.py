"""A minimal grpc.aio server: no interceptors, no checks, and a handler that sleeps and yields.

python -m benchmarks.peers.bare --text TEXT --delay SECONDS
"""

import argparse
import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import uvloop
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_proto.v1 import generation_pb2_grpc

TOKEN_CHARACTERS = 4


class BareService(generation_pb2_grpc.GenerationServiceServicer):
    """Streams the text in tokens of four characters, each after a delay of `delay` seconds."""

    def __init__(self, text: str, delay: float) -> None:
        self._tokens = [text[at : at + TOKEN_CHARACTERS] for at in range(0, len(text), TOKEN_CHARACTERS)]
        self._delay = delay

    async def GenerateDeltas(self, request: pb.GenerationRequest, context: Any) -> AsyncIterator[pb.GenerationDelta]:
        """Yields a delta for each token."""
        for number in range(request.max_tokens):
            await asyncio.sleep(self._delay)
            yield pb.GenerationDelta(
                text=self._tokens[number % len(self._tokens)],
                generated_tokens=number + 1,
                finish_reason="length" if number + 1 == request.max_tokens else "",
            )

    async def GenerateAll(self, request: pb.GenerationRequest, context: Any) -> pb.GenerationResponse:
        """Returns the whole text."""
        text = ""
        for number in range(request.max_tokens):
            await asyncio.sleep(self._delay)
            text += self._tokens[number % len(self._tokens)]
        sample = pb.GenerationResponseSample(text=text, generated_tokens=request.max_tokens, finish_reason="length")
        return pb.GenerationResponse(num_samples=1, responses=[sample], prompt=request.text)


async def start(service: generation_pb2_grpc.GenerationServiceServicer) -> tuple[grpc.aio.Server, int]:
    """Starts a server with the service, and returns the server and its port."""
    server = grpc.aio.server()
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, port


async def serve(service: generation_pb2_grpc.GenerationServiceServicer) -> None:
    """Serves on a free port until the process ends, and prints the address."""
    server, port = await start(service)
    print(f"ready: 127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


def arguments() -> argparse.Namespace:
    """Parses the command line: text and delay."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--text", required=True, help="the text that every answer repeats; 4 characters are a token")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds before each token")
    return parser.parse_args()


if __name__ == "__main__":
    chosen = arguments()
    uvloop.run(serve(BareService(chosen.text, chosen.delay)))  # type: ignore[abstract] # gRPC answers the other methods
