"""Server reflection, in both versions that tools ask for.

grpcio-reflection serves `grpc.reflection.v1alpha` only (grpc#38576), and newer tools ask for `grpc.reflection.v1` first. The
two differ in nothing but the name of the package, so v1 is made from v1alpha.
"""

from collections.abc import Iterable
from typing import Final

import grpc
import grpc.aio
from google.protobuf import descriptor_pb2, descriptor_pool, text_format
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

V1: Final = "grpc.reflection.v1.ServerReflection"
V1ALPHA: Final = reflection.SERVICE_NAME


def add_reflection(services: Iterable[str], server: grpc.aio.Server) -> None:
    """Adds reflection of the named services, and of itself, to the server."""
    _describe_v1()
    servicer = reflection.aio.ReflectionServicer((*services, V1, V1ALPHA))
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
