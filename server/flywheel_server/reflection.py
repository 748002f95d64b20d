"""Serves reflection in both versions that tools use.

grpcio-reflection serves `grpc.reflection.v1alpha` only (grpc#38576), and newer tools ask for `grpc.reflection.v1` first. The
two differ only in the name of the package, so v1 is made from v1alpha.
"""

from collections.abc import AsyncIterator, Iterable
from typing import Final

import grpc
import grpc.aio
from google.protobuf import (
    any_pb2,
    api_pb2,
    descriptor_pb2,
    descriptor_pool,
    duration_pb2,
    empty_pb2,
    field_mask_pb2,
    source_context_pb2,
    struct_pb2,
    text_format,
    timestamp_pb2,
    type_pb2,
    wrappers_pb2,
)
from google.protobuf.descriptor import FileDescriptor
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

from flywheel_server.grpc_types import GrpcContext

V1: Final = "grpc.reflection.v1.ServerReflection"
V1ALPHA: Final = reflection.SERVICE_NAME

COMMON_FILES: Final[tuple[FileDescriptor, ...]] = tuple(
    module.DESCRIPTOR
    for module in (
        any_pb2,
        api_pb2,
        descriptor_pb2,
        duration_pb2,
        empty_pb2,
        field_mask_pb2,
        source_context_pb2,
        struct_pb2,
        timestamp_pb2,
        type_pb2,
        wrappers_pb2,
        code_pb2,
        error_details_pb2,
        status_pb2,
    )
)
"""The well-known types, and google.rpc, which tools need to show the details of errors."""


class ReflectionServicer(reflection_pb2_grpc.ServerReflectionServicer):  # type: ignore[misc] # it has no types
    """Answers as the servicer of grpcio-reflection does, but takes the requests one by one and writes to the context."""

    def __init__(self, services: Iterable[str]) -> None:
        services = tuple(services)
        self._answering = reflection.aio.ReflectionServicer(services, ServedFiles(services))

    async def ServerReflectionInfo(self, request: reflection_pb2.ServerReflectionRequest, context: GrpcContext) -> None:
        """Sends the answer to one request. If a name is unknown, the answer holds NOT_FOUND, and the stream continues."""

        async def requests() -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
            yield request

        async for answer in self._answering.ServerReflectionInfo(requests(), context):
            answer.valid_host = request.host
            await context.write(answer)


class ServedFiles:
    """The descriptors of the services' files, of `COMMON_FILES`, and of all files that these import.

    Has the look-ups that grpcio-reflection uses, with the names of `DescriptorPool`; each raises `KeyError` for an unknown
    name. The default pool would show callers every other file that the process has loaded, such as the files of Modal's client.
    """

    def __init__(self, services: Iterable[str]) -> None:
        self._pool = descriptor_pool.DescriptorPool()
        self.FindFileByName = self._pool.FindFileByName
        self.FindMessageTypeByName = self._pool.FindMessageTypeByName
        self.FindExtensionByNumber = self._pool.FindExtensionByNumber
        self.FindAllExtensions = self._pool.FindAllExtensions
        self._names: set[str] = set()
        default = descriptor_pool.Default()
        for service in services:
            if service == V1:
                self._pool.AddSerializedFile(_v1().SerializeToString())
            else:
                self._add(default.FindServiceByName(service).file)
        for file in COMMON_FILES:
            self._add(file)

    def _add(self, file: FileDescriptor) -> None:
        if file.name not in self._names:
            self._names.add(file.name)
            for imported in file.dependencies:
                self._add(imported)
            self._pool.AddSerializedFile(file.serialized_pb)

    def FindFileContainingSymbol(self, symbol: str) -> FileDescriptor:
        """Returns the file that defines a service, method, message, field, oneof, enum, enum value or extension.

        An enum value is accepted by its full name (`package.VALUE`), and by the name with the enum in it that some tools use.
        """
        for find in (self._pool.FindFileContainingSymbol, self._file_of_method, self._file_of_enum_value):
            try:
                return find(symbol)
            except KeyError:
                continue
        raise KeyError(symbol)

    def _file_of_method(self, symbol: str) -> FileDescriptor:
        # Protobuf's own `FindFileContainingSymbol` does not find methods (protobuf 7.36, upb).
        return self._pool.FindMethodByName(symbol).containing_service.file

    def _file_of_enum_value(self, symbol: str) -> FileDescriptor:
        enum, _, value = symbol.rpartition(".")
        return self._pool.FindEnumTypeByName(enum).values_by_name[value].type.file


def add_reflection(services: Iterable[str], server: grpc.aio.Server) -> None:
    """Adds reflection to the server, for the named services and for reflection itself."""
    servicer = ReflectionServicer((*services, V1, V1ALPHA))
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, server)
    info = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(V1, {"ServerReflectionInfo": info}),))


def _v1() -> descriptor_pb2.FileDescriptorProto:
    """Returns the descriptor of the file that defines `grpc.reflection.v1`."""
    v1alpha = descriptor_pb2.FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(v1alpha)
    v1alpha.options.ClearField("deprecated")
    return text_format.Parse(str(v1alpha).replace("v1alpha", "v1"), descriptor_pb2.FileDescriptorProto())
