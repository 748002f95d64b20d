"""Reflection answers tools of both generations."""

from collections.abc import Iterator

import grpc
import pytest
from flywheel_server.engines.scripted import ScriptedEngine
from google.protobuf import descriptor_pb2
from grpc_reflection.v1alpha import reflection_pb2 as reflection

from tests.serving import Target, serving

VERSIONS = ["grpc.reflection.v1", "grpc.reflection.v1alpha"]


async def ask(target: Target, version: str, **request: str) -> reflection.ServerReflectionResponse:
    method = target.channel.stream_stream(
        f"/{version}.ServerReflection/ServerReflectionInfo",
        reflection.ServerReflectionRequest.SerializeToString,
        reflection.ServerReflectionResponse.FromString,
    )

    def requests() -> Iterator[reflection.ServerReflectionRequest]:
        yield reflection.ServerReflectionRequest(**request)

    call = method(requests())
    response = await call.read()
    assert isinstance(response, reflection.ServerReflectionResponse)
    assert not isinstance(await call.read(), reflection.ServerReflectionResponse), "one answer to one question"
    return response


@pytest.mark.parametrize("version", VERSIONS)
async def test_services_are_listed_and_described(version: str) -> None:
    async with serving(ScriptedEngine()) as target:
        listed = await ask(target, version, list_services="")
        names = {service.name for service in listed.list_services_response.service}
        assert names == {
            "flywheel.v1.GenerationService",
            "grpc.health.v1.Health",
            "grpc.reflection.v1.ServerReflection",
            "grpc.reflection.v1alpha.ServerReflection",
        }
        for name in names:
            described = await ask(target, version, file_containing_symbol=name)
            files = [
                descriptor_pb2.FileDescriptorProto.FromString(data)
                for data in described.file_descriptor_response.file_descriptor_proto
            ]
            assert name in {f"{file.package}.{service.name}" for file in files for service in file.service}
        file = await ask(target, version, file_by_filename="flywheel/v1/generation.proto")
        assert file.file_descriptor_response.file_descriptor_proto
        missing = await ask(target, version, file_containing_symbol="flywheel.v1.Nothing")
        assert missing.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]
