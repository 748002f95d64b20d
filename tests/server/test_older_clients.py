"""Clients with the stubs of the last release call this server as before."""

from typing import Any

import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.engines.scripted import Script, ScriptedEngine
from flywheel_server.messages import FLYWHEEL_FIELDS
from google.protobuf import descriptor_pb2, text_format
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

from fuzz.ranges import highest, ranges
from fuzz.targets import LIMITS
from tests.contract import ROOT
from tests.server.test_reading import PATH
from tests.serving import Target, serving

SERVICE = "flywheel.v1.GenerationService"
METHODS = ["Generate", "GenerateDeltas", "GenerateAll", "GetModel", "GetStats"]
HONOURED = {name: its for name, its in ranges(LIMITS).items() if name in FLYWHEEL_FIELDS}
FIELDS: dict[str, Any] = highest(HONOURED) | {"text": "x", "max_tokens": 3, "eos_token_ids": [10**9], "num_samples": 2}


@pytest.fixture(scope="module")
def released() -> DescriptorPool:
    """The contract of the last release."""
    contract = (ROOT / "proto" / "baseline.txtpb").read_text()
    files = text_format.Parse(contract, descriptor_pb2.FileDescriptorSet(), allow_unknown_field=True)
    pool = DescriptorPool()
    for file in files.file:
        pool.AddSerializedFile(file.SerializeToString())
    return pool


async def answers(target: Target, pool: DescriptorPool, method: str, fields: dict[str, Any]) -> list[Any]:
    """Calls the method as a client with this contract does, and returns all messages."""
    described = pool.FindServiceByName(SERVICE).methods_by_name[method]
    request: Any = GetMessageClass(described.input_type)(**fields)
    parse: Any = GetMessageClass(described.output_type).FromString
    kind = "stream" if described.server_streaming else "unary"
    call = getattr(target.channel, f"unary_{kind}")(PATH + method, lambda message: message.SerializeToString(), parse)(request)
    return [message async for message in call] if described.server_streaming else [await call]


@pytest.mark.parametrize("method", METHODS)
async def test_each_method_answers_an_older_client(released: DescriptorPool, method: str) -> None:
    fields = FIELDS if method.startswith("Generate") else {}
    async with serving(ScriptedEngine(Script(text="abcd"))) as target:
        received = await answers(target, released, method, fields)
    match method:
        case "Generate":
            assert [message.text for message in received] == ["abcdabcdabcd"] * 2
        case "GenerateDeltas":
            assert "".join(message.text for message in received) == "abcd" * 6
        case "GenerateAll":
            assert [sample.text for sample in received[0].responses] == ["abcdabcdabcd"] * 2
        case "GetModel":
            assert received[0].limits.max_num_samples == 16
        case "GetStats":
            assert received[0].num_total_runners == 1


def test_a_newer_client_can_tell_an_older_server(released: DescriptorPool) -> None:
    older: Any = GetMessageClass(released.FindMessageTypeByName("flywheel.v1.Model"))
    model = pb.Model.FromString(older(name="m", context_tokens=5).SerializeToString())
    if "supported_fields" not in older.DESCRIPTOR.fields_by_name:
        assert not model.supported_fields
    assert model.name == "m"
