"""Records of calls: what is kept of them when the calls have ended."""

import gc

from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.engines.scripted import ScriptedEngine
from flywheel_server.messages import GenerationRequest

from tests.serving import serving


async def test_an_ended_call_keeps_nobodys_prompt_in_memory() -> None:
    """Timers of a call keep its context, and so its record, until they are due."""

    def requests() -> int:
        gc.collect()
        return sum(type(thing) is GenerationRequest and thing.text == "to be forgotten" for thing in gc.get_objects())

    async with serving(ScriptedEngine(), slow_call=10) as target:
        for _ in range(5):
            await target.stub.GenerateAll(pb.GenerationRequest(text="to be forgotten", max_tokens=1), timeout=60)
        assert requests() < 5
