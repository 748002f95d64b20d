"""The descriptor set of `make descriptor`: alone, it explains everything that a server answers with."""

import inspect
from typing import Any

import grpc
import grpc.aio
import pytest
from flywheel_proto.v1 import generation_pb2
from flywheel_server import errors
from flywheel_server.engines import base
from flywheel_server.engines.scripted import ScriptedEngine
from google.protobuf import json_format
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2

from tests.contract import DESCRIPTOR, ROOT, write_descriptor_set
from tests.pulled import PulledEngine
from tests.serving import as_dict, serving

SERVICE = "flywheel.v1.GenerationService"
HEALTH = "grpc.health.v1.Health"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> FileDescriptorSet:
    file = write_descriptor_set(tmp_path_factory.mktemp("descriptor") / "set.binpb")
    return FileDescriptorSet.FromString(file.read_bytes())


@pytest.fixture(scope="module")
def pool(files: FileDescriptorSet) -> DescriptorPool:
    """Everything that is known to a tool that has only the set."""
    pool = DescriptorPool()
    for file in files.file:
        pool.AddSerializedFile(file.SerializeToString())
    return pool


def test_every_file_comes_after_those_that_it_imports(files: FileDescriptorSet) -> None:
    seen: set[str] = set()
    for file in files.file:
        assert seen.issuperset(file.dependency), file.name
        seen.add(file.name)


def test_its_contract_is_that_of_the_generated_code(files: FileDescriptorSet) -> None:
    generation_pb2.DESCRIPTOR.CopyToProto(generated := FileDescriptorProto())
    (contract,) = [file for file in files.file if file.name == generated.name]
    comments = [location.leading_comments for location in contract.source_code_info.location]
    assert any("The maximum number of tokens to generate for each sample." in comment for comment in comments), (
        "tools show them"
    )
    contract = FileDescriptorProto.FromString(contract.SerializeToString())
    contract.ClearField("source_code_info")
    for described in contract.message_type:
        for message in (described, *described.nested_type):  # such as the entries of a map
            for field in message.field:
                field.ClearField("json_name")  # which buf writes out, and Python leaves to the rule
    assert contract == generated


def test_it_has_every_kind_of_detail_that_an_error_of_the_server_can_have(pool: DescriptorPool) -> None:
    used = [name for name, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == error_details_pb2.__name__]
    assert len(used) >= 4
    for name in used:
        pool.FindMessageTypeByName(f"google.rpc.{name}")


def message(pool: DescriptorPool, name: str, **fields: Any) -> Message:
    return GetMessageClass(pool.FindMessageTypeByName(name))(**fields)


async def call(channel: grpc.aio.Channel, pool: DescriptorPool, service: str, method: str, **fields: Any) -> dict[str, Any]:
    """Calls as grpcurl does, with what the set says, and returns the response, or the error, as JSON."""
    described = pool.FindServiceByName(service).methods_by_name[method]
    request, response = (GetMessageClass(each) for each in (described.input_type, described.output_type))
    sent = channel.unary_unary(
        f"/{service}/{method}", request_serializer=request.SerializeToString, response_deserializer=response.FromString
    )
    try:
        answer = await sent(request(**fields), timeout=60)
    except grpc.aio.AioRpcError as error:
        answer = message(pool, "google.rpc.Status")
        answer.ParseFromString(as_dict(error.trailing_metadata())["grpc-status-details-bin"])
    found: dict[str, Any] = json_format.MessageToDict(answer, preserving_proto_field_name=True, descriptor_pool=pool)
    return found


async def test_it_stands_in_for_reflection(pool: DescriptorPool) -> None:
    async with serving(ScriptedEngine(), reflection=False) as target:
        text = await call(target.channel, pool, SERVICE, "GenerateAll", text="hello", max_tokens=3)
        assert text["prompt"] == "hello"
        assert text["responses"][0]["finish_reason"] == "length"
        assert (await call(target.channel, pool, SERVICE, "GetModel"))["engine"] == "scripted"
        assert await call(target.channel, pool, HEALTH, "Check") == {"status": "SERVING"}


class RefusingEngine(PulledEngine):
    """Ends each call with the error, and passes the checks of the server."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    async def events(self, prepared: base.PreparedRequest) -> Any:
        async for event in super().events(prepared):
            if prepared.request.text == "refuse":
                raise self.error
            yield event


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            errors.QuotaExceededError("team-a", "tokens_per_minute is 100", 2.5),
            {
                "RetryInfo": {"retry_delay": "2.500s"},
                "QuotaFailure": {"violations": [{"subject": "team-a", "description": "tokens_per_minute is 100"}]},
                "ErrorInfo": {"reason": "QUOTA_EXCEEDED", "domain": "flywheel.v1"},
            },
        ),
        (
            base.UnsupportedFieldError("top_k", "it is unknown here"),
            {
                "BadRequest": {"field_violations": [{"field": "top_k", "description": "is not supported: it is unknown here"}]},
                "ErrorInfo": {"reason": "UNSUPPORTED_FIELD", "domain": "flywheel.v1", "metadata": {"field": "top_k"}},
            },
        ),
    ],
    ids=["quota", "field"],
)
async def test_it_puts_error_details_in_words(error: Exception, expected: dict[str, Any], pool: DescriptorPool) -> None:
    async with serving(RefusingEngine(error), reflection=False) as target:
        answer = await call(target.channel, pool, SERVICE, "GenerateAll", text="refuse", max_tokens=3)
    assert {detail.pop("@type").rpartition(".")[2]: detail for detail in answer["details"]} == expected


def test_make_writes_it_where_the_documents_say() -> None:
    assert f"proto/descriptor.py {DESCRIPTOR}" in (ROOT / "Makefile").read_text()
