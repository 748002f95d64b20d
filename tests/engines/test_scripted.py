"""Scripts that the conformance suite does not play."""

import grpc
import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.engines.scripted import Script, ScriptedEngine

from tests.serving import serving


@pytest.mark.parametrize("how", [{"fail_after": 1}, {"fail_in_queue": True}], ids=str)
async def test_it_fails_only_on_the_prompts_that_the_script_names(how: dict[str, int]) -> None:
    async with serving(ScriptedEngine(Script(fail_on="fail", **how))) as target:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await target.stub.GenerateAll(pb.GenerationRequest(text="Please fail.", max_tokens=2))
        assert raised.value.code() is grpc.StatusCode.INTERNAL
        response = await target.stub.GenerateAll(pb.GenerationRequest(text="Please succeed.", max_tokens=2))
        assert response.responses[0].generated_tokens == 2


async def test_it_plays_the_prompt_of_each_caller() -> None:
    async with serving(ScriptedEngine(Script(plays_prompt=True, bytes_per_token=3))) as target:
        response = await target.stub.GenerateAll(pb.GenerationRequest(text="ab🦙cd", max_tokens=5))
        assert response.responses[0].text == "ab🦙cdab🦙"
