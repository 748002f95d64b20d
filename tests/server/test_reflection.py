"""Reflection answers tools that ask for v1, and tools that ask for v1alpha."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from flywheel_server.engines.scripted import ScriptedEngine
from flywheel_server.reflection import COMMON_FILES, ReflectionServicer
from google.protobuf import descriptor_pb2, descriptor_pool
from grpc_reflection.v1alpha import reflection_pb2 as reflection

from tests.serving import serving

VERSIONS = ["grpc.reflection.v1", "grpc.reflection.v1alpha"]
SERVICES = {
    "flywheel.v1.GenerationService",
    "grpc.health.v1.Health",
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
}
METHODS = {
    "flywheel.v1.GenerationService.Generate",
    "grpc.health.v1.Health.Check",
    "grpc.reflection.v1.ServerReflection.ServerReflectionInfo",
    "grpc.reflection.v1alpha.ServerReflection.ServerReflectionInfo",
}

Files = dict[str, descriptor_pb2.FileDescriptorProto]


class Conversation:
    """One stream of reflection."""

    def __init__(self, call: Any) -> None:
        self._call = call

    async def ask(self, **request: Any) -> reflection.ServerReflectionResponse:
        asked = reflection.ServerReflectionRequest(host="example.org", **request)
        await self._call.write(asked)
        answer: reflection.ServerReflectionResponse = await self._call.read()
        assert (answer.original_request, answer.valid_host) == (asked, "example.org")
        return answer

    async def files(self, **request: Any) -> Files:
        """Returns the files of the answer by name, the requested file first."""
        return files_in(await self.ask(**request))

    async def is_missing(self, **request: Any) -> bool:
        answer = await self.ask(**request)
        return bool(answer.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0])


def files_in(answer: reflection.ServerReflectionResponse) -> Files:
    parsed = map(descriptor_pb2.FileDescriptorProto.FromString, answer.file_descriptor_response.file_descriptor_proto)
    return {file.name: file for file in parsed}


@asynccontextmanager
async def conversation(version: str) -> AsyncIterator[Conversation]:
    async with serving(ScriptedEngine()) as target:
        call = target.channel.stream_stream(
            f"/{version}.ServerReflection/ServerReflectionInfo",
            reflection.ServerReflectionRequest.SerializeToString,
            reflection.ServerReflectionResponse.FromString,
        )()
        yield Conversation(call)
        await call.done_writing()
        assert await call.code() is grpc.StatusCode.OK


def symbols_of(file: descriptor_pb2.FileDescriptorProto) -> Iterator[str]:
    """Yields the full name of everything that a file defines."""

    def scoped(scope: str, *kinds: Any) -> Iterator[str]:
        yield from (f"{scope}.{each.name}" for kind in kinds for each in kind)

    def enums(scope: str, defined: Any) -> Iterator[str]:
        for enum in defined:
            yield f"{scope}.{enum.name}"
            yield from scoped(scope, enum.value)
            yield from scoped(f"{scope}.{enum.name}", enum.value)

    def messages(scope: str, defined: Any) -> Iterator[str]:
        for message in defined:
            name = f"{scope}.{message.name}"
            yield name
            yield from scoped(name, message.field, message.oneof_decl, message.extension)
            yield from enums(name, message.enum_type)
            yield from messages(name, message.nested_type)

    yield from scoped(file.package, file.service, file.extension)
    for service in file.service:
        yield from scoped(f"{file.package}.{service.name}", service.method)
    yield from enums(file.package, file.enum_type)
    yield from messages(file.package, file.message_type)


@pytest.mark.parametrize("version", VERSIONS)
async def test_services_are_listed(version: str) -> None:
    async with conversation(version) as reflected:
        listed = await reflected.ask(list_services="")
        assert {service.name for service in listed.list_services_response.service} == SERVICES


@pytest.mark.parametrize("version", VERSIONS)
async def test_every_symbol_of_the_services_finds_its_file(version: str) -> None:
    async with conversation(version) as reflected:
        found = set()
        for service in SERVICES:
            file, *_ = (await reflected.files(file_containing_symbol=service)).values()
            symbols = set(symbols_of(file))
            assert service in symbols
            for symbol in symbols:
                assert next(iter(await reflected.files(file_containing_symbol=symbol))) == file.name, symbol
            found |= symbols
        assert found >= METHODS


@pytest.mark.parametrize("version", VERSIONS)
async def test_every_symbol_of_the_common_files_finds_its_file(version: str) -> None:
    async with conversation(version) as reflected:
        for common in COMMON_FILES:
            file = (await reflected.files(file_by_filename=common.name))[common.name]
            for symbol in symbols_of(file):
                assert next(iter(await reflected.files(file_containing_symbol=symbol))) == file.name, symbol


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_file_comes_with_all_that_it_imports(version: str) -> None:
    async with conversation(version) as reflected:
        for name in [file.name for file in COMMON_FILES] + ["flywheel/v1/generation.proto"]:
            files = await reflected.files(file_by_filename=name)
            assert next(iter(files)) == name
            assert {imported for file in files.values() for imported in file.dependency} <= files.keys()


@pytest.mark.parametrize("version", VERSIONS)
async def test_what_is_not_there_is_not_found_and_the_stream_goes_on(version: str) -> None:
    service, model = "flywheel.v1.GenerationService", "flywheel.v1.Model"
    symbols = [
        "",
        ".",
        "..",
        "flywheel",
        "flywheel.v1",
        f".{model}",
        f"{model}.",
        f"{model}..name",
        f"{model}.name.x",
        f"{model} ",
    ]
    symbols += [
        f"{service}.generate",
        f"{service}.",
        f"{service}/Generate",
        "flywheel.v1.Generate",
        "Generate",
        "é",
        "\0",
        "x" * 4000,
    ]
    symbols += ["grpc.health.v1.HealthCheckResponse.ServingStatus.", "grpc.health.v1.HealthCheckResponse.ServingStatus.NOTHING"]
    files = ["", ".", "/", "generation.proto", "flywheel/v1/nothing.proto", "flywheel.v1.Model", "/etc/passwd"]
    async with conversation(version) as reflected:
        for symbol in symbols:
            assert await reflected.is_missing(file_containing_symbol=symbol), symbol
        for file in files:
            assert await reflected.is_missing(file_by_filename=file), file
        for extended in ("", "flywheel.v1.Nothing", model, "google.protobuf.FileOptions"):
            for number in (-1, 0, 1, 2**31 - 1):
                asked = reflection.ExtensionRequest(containing_type=extended, extension_number=number)
                assert await reflected.is_missing(file_containing_extension=asked), (extended, number)
        for unknown in ("", "flywheel.v1.Nothing", service, f"{service}.Generate", f"{model}.name"):
            assert await reflected.is_missing(all_extension_numbers_of_type=unknown), unknown
        for known in (model, "google.protobuf.FileOptions"):
            numbers = (await reflected.ask(all_extension_numbers_of_type=known)).all_extension_numbers_response
            assert (numbers.base_type_name, list(numbers.extension_number)) == (known, [])
        assert (await reflected.ask()).error_response.error_code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
        assert await reflected.files(file_containing_symbol=model)


EXTENDED = descriptor_pb2.FileDescriptorProto(
    name="tests/server/extended.proto",
    package="tests.server",
    dependency=["google/protobuf/descriptor.proto"],
    syntax="proto3",
    message_type=[descriptor_pb2.DescriptorProto(name="Scope")],
    service=[descriptor_pb2.ServiceDescriptorProto(name="Extended")],
)
"""A file with extensions, which the process has loaded."""
for _number, _scope in ((50_001, EXTENDED), (50_002, EXTENDED.message_type[0])):
    _scope.extension.add(
        name="label", number=_number, type="TYPE_STRING", label="LABEL_OPTIONAL", extendee=".google.protobuf.FieldOptions"
    )
descriptor_pool.Default().AddSerializedFile(EXTENDED.SerializeToString())
FIELD_OPTIONS = "google.protobuf.FieldOptions"
EXTENSIONS = [
    reflection.ExtensionRequest(containing_type=FIELD_OPTIONS, extension_number=number) for number in (50_001, 50_002)
]


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_file_that_is_loaded_but_not_served_is_not_shown(version: str) -> None:
    async with conversation(version) as reflected:
        assert await reflected.is_missing(file_by_filename=EXTENDED.name)
        for symbol in symbols_of(EXTENDED):
            assert await reflected.is_missing(file_containing_symbol=symbol)
        for extension in EXTENSIONS:
            assert await reflected.is_missing(file_containing_extension=extension)
        numbers = await reflected.ask(all_extension_numbers_of_type=FIELD_OPTIONS)
        assert not numbers.all_extension_numbers_response.extension_number


class Answers:
    """A context that keeps the last answer."""

    def __init__(self) -> None:
        self.last = reflection.ServerReflectionResponse()

    async def write(self, answer: reflection.ServerReflectionResponse) -> None:
        self.last = answer


async def test_extensions_of_a_file_that_is_served_are_found() -> None:
    servicer = ReflectionServicer(["tests.server.Extended"])

    async def ask(**request: Any) -> reflection.ServerReflectionResponse:
        answers: Any = Answers()
        await servicer.ServerReflectionInfo(reflection.ServerReflectionRequest(**request), answers)
        return answers.last

    imports = {EXTENDED.name, "google/protobuf/descriptor.proto"}
    for extension in EXTENSIONS:
        assert files_in(await ask(file_containing_extension=extension)).keys() == imports
    for symbol in symbols_of(EXTENDED):
        assert files_in(await ask(file_containing_symbol=symbol)).keys() == imports
    numbers = await ask(all_extension_numbers_of_type=FIELD_OPTIONS)
    assert list(numbers.all_extension_numbers_response.extension_number) == [50_001, 50_002]
