"""A bare grpc.aio server that streams deltas with nothing around them, to compare with: `python -m benchmarks.bare_server`.

The prompt is ignored. It makes `max_tokens` deltas, one every TOKEN_DELAY seconds, which is its only argument; with 0 it makes
them as fast as they are written.
"""

import asyncio
import sys
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import uvloop
from flywheel_proto.v1 import generation_pb2


async def serve(token_delay: float) -> None:
    """Serves on a free port, which it prints, until the process is ended."""

    async def deltas(
        request: generation_pb2.GenerationRequest,
        _: "grpc.aio.ServicerContext[generation_pb2.GenerationRequest, generation_pb2.GenerationDelta]",
    ) -> AsyncIterator[generation_pb2.GenerationDelta]:
        for number in range(1, request.max_tokens + 1):
            if token_delay:
                await asyncio.sleep(token_delay)
            yield generation_pb2.GenerationDelta(text="llam", generated_tokens=number)

    method = grpc.unary_stream_rpc_method_handler(
        deltas, generation_pb2.GenerationRequest.FromString, generation_pb2.GenerationDelta.SerializeToString
    )
    service = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {"GenerateDeltas": method}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    uvloop.run(serve(float(sys.argv[1])))
