"""The server returns the memory that it needs to tokenize a long prompt."""

import sys

import pytest
from flywheel_proto.v1 import generation_pb2 as pb

from fuzz.probe import flywheel_server
from tests.serving import connected, until

MIB = 2**20
# Texts of different shapes: one token for each byte, many short words, one long word, and no words.
TEXTS = ["1" * MIB, "aA1!" * (MIB // 4), "a" * (MIB // 4), "\n\t " * (MIB // 12)]


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
async def test_long_prompts_leave_nothing_behind() -> None:
    with flywheel_server("--engine=embedded", "--embedded-threads=1", "--embedded-context=256") as server:
        async with connected(server.address) as target:

            async def tokenized(text: str) -> None:
                await target.stub.GenerateAll(pb.GenerationRequest(text=text, max_tokens=1, max_input_tokens=16))

            await tokenized("x")
            before = server.resident()
            for text in TEXTS * 2:
                await tokenized(text)
            # llama.cpp frees a text a moment after its answer.
            await until(
                lambda: server.resident() < before + 60, "the server keeps less than half of the memory of one prompt", within=2
            )
