"""A field that the server does not know ends the call, so that a constraint of a newer client is never dropped."""

from typing import Any

import grpc
import grpc.aio
import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.engines.scripted import ScriptedEngine
from flywheel_server.errors import UnknownFieldError
from flywheel_server.unknown_fields import MAX_REPORTED, refuse_unknown_fields
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo

from tests.cpu_time import check_cpu_time
from tests.server.test_errors import details_of
from tests.server.test_reading import PATH
from tests.serving import drained, serving

FULL = pb.GenerationRequest(
    text="x", max_tokens=1, stop=["a"], messages=[pb.Message(role="user", content="y")], logit_bias={1: 2.0}, regex="a"
)
VARINT = b"\x98\x06\x01"
"""Field 99 with the number 1."""
KINDS = {
    "varint": VARINT,
    "long varint": b"\x98\x06" + b"\xff" * 9 + b"\x01",
    "fixed64": b"\x99\x06" + b"12345678",
    "bytes": b"\x9a\x06\x03abc",
    "group": b"\x9b\x06\x08\x01\x9c\x06",
    "fixed32": b"\x9d\x06" + b"1234",
}


def unknown(message: Message) -> list[tuple[str, int]]:
    """Returns the unknown fields that the message is refused for."""
    with pytest.raises(UnknownFieldError) as caught:
        refuse_unknown_fields(message)
    return list(caught.value.fields)


def message_with(data: bytes) -> pb.Message:
    return pb.Message.FromString(pb.Message(role="user", content="y").SerializeToString() + data)


@pytest.mark.parametrize("data", KINDS.values(), ids=KINDS)
def test_each_kind_is_found_in_each_message(data: bytes) -> None:
    assert unknown(pb.GenerationRequest.FromString(FULL.SerializeToString() + data)) == [("", 99)]
    nested = pb.GenerationRequest(text="x", max_tokens=1, messages=[message_with(b""), message_with(data)])
    assert unknown(nested) == [("messages[1]", 99)]
    assert unknown(pb.TokenizeRequest(messages=[message_with(data)])) == [("messages[0]", 99)]
    choices = pb.Choices.FromString(pb.Choices(texts=["a"]).SerializeToString() + data)
    assert unknown(pb.GenerationRequest(text="x", choices=choices)) == [("choices", 99)]
    assert unknown(pb.GetModelRequest.FromString(data)) == [("", 99)]


def test_a_message_without_unknown_fields_is_left_as_it_is() -> None:
    message = pb.GenerationRequest()
    message.CopyFrom(FULL)
    refuse_unknown_fields(message)
    assert message == FULL


def test_several_are_reported_and_not_more_than_a_few() -> None:
    data = pb.GenerationRequest(text="x", messages=[message_with(VARINT)]).SerializeToString()
    several = b"".join(KINDS[kind] for kind in ("bytes", "fixed64", "fixed32", "group"))
    assert unknown(pb.GenerationRequest.FromString(data + several)) == [("messages[0]", 99)] + [("", 99)] * 4
    assert len(unknown(pb.GenerationRequest.FromString(data + VARINT * 1000))) == MAX_REPORTED


def test_a_known_field_of_another_type_is_unknown() -> None:
    assert unknown(pb.GenerationRequest.FromString(b"\x08\x01")) == [("", 1)]


OTHER_TYPES = {"varint": b"\x00\x01", "fixed64": b"\x01" + b"12345678", "bytes": b"\x02\x03abc", "fixed32": b"\x05" + b"1234"}
"""Fields of each type, with the number 0."""
PACKED = (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE)


def with_number(data: bytes, number: int) -> bytes:
    return varint(number << 3 | data[0]) + data[1:]


def encoded_otherwise(field: FieldDescriptor) -> bytes:
    """Returns the field with a type that is not its own."""
    is_text = field.cpp_type not in PACKED
    is_whole = field.cpp_type == FieldDescriptor.CPPTYPE_INT32
    return with_number(OTHER_TYPES["varint" if is_text else "fixed64" if is_whole else "varint"], field.number)


KNOWN = [
    *((pb.GenerationRequest, "Generate", field.name) for field in pb.GenerationRequest.DESCRIPTOR.fields),
    *((pb.TokenizeRequest, "Tokenize", field.name) for field in pb.TokenizeRequest.DESCRIPTOR.fields),
]


@pytest.mark.parametrize(("kind", "method", "name"), KNOWN)
async def test_the_caller_learns_the_name_of_a_field_that_has_another_type(kind: Any, method: str, name: str) -> None:
    field = kind.DESCRIPTOR.fields_by_name[name]
    async with serving(ScriptedEngine()) as target:
        call = target.channel.unary_stream(PATH + method, bytes, bytes)(b"\n\x01x" + encoded_otherwise(field) + VARINT)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await drained(call)
    details = details_of(caught.value)
    found = {violation.field: violation.description for violation in details[BadRequest].field_violations}
    assert found == {name: "has another type than this server knows", "99": "is a field that this server does not know"}
    assert name in (caught.value.details() or "")
    assert details[ErrorInfo].metadata == {"field": str(field.number)}


def test_an_element_may_have_a_field_of_another_type() -> None:
    message = pb.GenerationRequest(messages=[message_with(b""), message_with(with_number(OTHER_TYPES["varint"], 1))])
    with pytest.raises(UnknownFieldError) as caught:
        refuse_unknown_fields(message)
    assert caught.value.names == {("messages[1]", 1): "role"}


@pytest.mark.parametrize("wrap", [lambda data: data, lambda data: b"b" + varint(len(data)) + data], ids=["top", "nested"])
def test_millions_are_refused_at_once(wrap: Any) -> None:
    """An object for each of them takes more than a second."""
    message = pb.GenerationRequest.FromString(wrap(VARINT * 1_300_000))

    def refuse() -> None:
        assert len(unknown(message)) == MAX_REPORTED

    check_cpu_time(0.1, refuse)


def varint(number: int) -> bytes:
    return bytes([number & 127 | 128]) + varint(number >> 7) if number > 127 else bytes([number])


@pytest.mark.parametrize("method", ["Generate", "GenerateDeltas", "GenerateAll", "GetModel", "GetStats", "Tokenize"])
async def test_the_caller_learns_the_number(method: str) -> None:
    async with serving(ScriptedEngine()) as target:
        call = target.channel.unary_stream(PATH + method, bytes, bytes)(b"\n\x01x" * method.startswith(("Gen", "Tok")) + VARINT)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await drained(call)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    details = details_of(caught.value)
    assert details[ErrorInfo].reason == "UNKNOWN_FIELD"
    assert details[ErrorInfo].metadata == {"field": "99"}
    assert [violation.field for violation in details[BadRequest].field_violations] == ["99"]
