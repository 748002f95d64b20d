"""Server reflection, in both versions that tools ask for.

grpcio-reflection serves `grpc.reflection.v1alpha` only (grpc#38576), and newer tools ask for `grpc.reflection.v1` first. The
two differ in nothing but the name of the package, so v1 is made from v1alpha.
"""

from collections.abc import AsyncIterator, Iterable
from typing import Any, Final

import grpc
import grpc.aio
from google.protobuf import descriptor_pb2, descriptor_pool, text_format
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]

V1: Final = "grpc.reflection.v1.ServerReflection"
V1ALPHA: Final = reflection.SERVICE_NAME


class ReflectionServicer(reflection_pb2_grpc.ServerReflectionServicer):  # type: ignore[misc] # it has no types
    """Answers as that of grpcio-reflection does, but gets the requests one by one, and writes to the context."""

    def __init__(self, services: Iterable[str]) -> None:
        self._answering = reflection.aio.ReflectionServicer(services)

    async def ServerReflectionInfo(self, request: reflection_pb2.ServerReflectionRequest, context: Context) -> None:
        """Sends the answer to one request."""

        async def requests() -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
            yield request

        async for answer in self._answering.ServerReflectionInfo(requests(), context):
            await context.write(answer)


def add_reflection(services: Iterable[str], server: grpc.aio.Server) -> None:
    """Adds reflection of the named services, and of itself, to the server."""
    _describe_v1()
    servicer = ReflectionServicer((*services, V1, V1ALPHA))
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, server)
    info = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(V1, {"ServerReflectionInfo": info}),))


def _describe_v1() -> None:
    """Makes v1 known to the descriptor pool, so that tools can describe it like any other service."""
    pool = descriptor_pool.Default()
    try:
        pool.FindServiceByName(V1)
    except KeyError:
        v1alpha = descriptor_pb2.FileDescriptorProto()
        reflection_pb2.DESCRIPTOR.CopyToProto(v1alpha)
        v1alpha.options.ClearField("deprecated")
        v1 = text_format.Parse(str(v1alpha).replace("v1alpha", "v1"), descriptor_pb2.FileDescriptorProto())
        pool.AddSerializedFile(v1.SerializeToString())
